"""Whether training is well: updates that are left out, losses that jump, steps that never end."""

import contextlib
import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fusiontree.config import HealthConfig
from fusiontree.data.preview import rows_at
from fusiontree.data.stream import TrainStream
from fusiontree.distributed import collectives, outcome
from fusiontree.distributed.collectives import World
from fusiontree.errors import HungError
from fusiontree.run import incidents
from fusiontree.run.folder import LOGS
from fusiontree.training.step import Update

_NAMED = 4  # rows of an update gone wrong that are named on the console; the incident has all
_FLOOR = 0.005  # of the median loss: the least that counts as its deviation, so that a very even loss has no spikes
_KNOWN = 5  # steps whose time must be known before one can be too long
_LAST_WORDS = 3.0  # seconds in which all ranks write their stacks before the first one ends


class Trouble(NamedTuple):
    """What is wrong with an update, and what is to be done."""

    kind: Literal["skipped_update", "loss_spike"]
    message: str
    rows: tuple[int, int]  # rows consumed before and behind what is to be stepped past
    action: Literal["go on", "rollback", "stop"]


class Health:
    """Judges every update from figures that all ranks share, so that they decide alike."""

    def __init__(self, config: HealthConfig):
        self.config = config
        self.skipped = 0  # updates left out so far
        self.bad: list[tuple[int, int]] = []  # rows consumed before and behind each update of those, in a row
        self.losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, update: Update, rows: tuple[int, int]) -> Trouble | None:
        """What is wrong with an update over the rows between the two of `rows`, if anything."""
        loss = update.loss
        if update.skipped:
            self.skipped += 1
            self.bad.append(rows)
            what = f"gradient norm is {float(update.grad_norm)}" if math.isfinite(loss) else f"loss is {loss}"
            message = f"{what}: the update is left out, {len(self.bad)} in a row"
            action = self.config.on_bad if len(self.bad) >= self.config.max_bad_steps else "go on"
            return Trouble("skipped_update", message, (self.bad[0][0], rows[1]), action)
        self.bad.clear()
        score = robust_score(self.losses, loss) if len(self.losses) >= self.config.spike_window / 2 else 0.0
        median = statistics.median(self.losses) if self.losses else loss
        self.losses.append(loss)
        if score <= self.config.spike_score:
            return None
        message = f"loss {loss:.4f} is {score:.1f} robust deviations above the median {median:.4f}"
        return Trouble(
            "loss_spike", message, rows, "go on" if self.config.on_spike == "ignore" else self.config.on_spike
        )

    def to_json(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        return {"skipped": self.skipped, "bad": self.bad, "losses": list(self.losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the run went on whose `to_json` is given."""
        self.skipped = state["skipped"]
        self.bad = [(first, end) for first, end in state["bad"]]
        self.losses = deque(state["losses"], self.config.spike_window)


def robust_score(values: "deque[float]", value: float) -> float:
    """How far `value` lies above the median of `values`, in units of 1.4826 times their median deviation."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - median) for v in values)
    return (value - median) / max(deviation, _FLOOR * abs(median))


def rows_of_failing_ranks(stream: TrainStream, rows_consumed: int, finite: bool) -> list[dict[str, Any]]:
    """The rows of the step behind `rows_consumed`: of the ranks whose own loss is not `finite`, or else of all.

    All ranks call it together. A row is its source, shard, row in the shard and first token there.
    """
    own = rows_at(stream, rows_consumed)
    places = [{key: row[key] for key in ("source", "shard", "row", "first_token")} for row in own]
    told = collectives.gather((finite, places))
    of_all = [places for finite, places in told if not finite] or [places for _, places in told]
    return [place for places in of_all for place in places]


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Some of `rows` for a line on the console."""
    named = ", ".join(f"{row['shard']} row {row['row']} from token {row['first_token']}" for row in rows[:_NAMED])
    return named + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


class Watchdog:
    """Ends this rank when a step takes far longer than steps do; each rank has one, so that all write their stacks."""

    def __init__(self, config: HealthConfig, run_dir: Path, world: World):
        self.config, self.run_dir, self.world = config, run_dir, world
        self._took: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self._since: tuple[float, int] | None = None  # when the step began that is under way, and its number
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch what is done inside: step `number`."""
        began = time.monotonic()
        self._since = began, number
        try:
            yield
        finally:
            self._since = None
        self._took.append(time.monotonic() - began)

    @property
    def limit(self) -> float:
        """Seconds that a step may take."""
        if len(self._took) < _KNOWN:  # the first ones compile; the time-outs of the process groups hold for them
            return math.inf
        return max(self.config.hang_seconds, self.config.hang_factor * statistics.median(self._took))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.config.hang_seconds / 10)):
            since = self._since
            if since is not None and time.monotonic() - since[0] > self.limit:
                self._end(since[1])

    def _end(self, step: int) -> None:
        with open(self._stacks(self.world.rank), "w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        median = statistics.median(self._took)
        message = (
            f"step {step + 1:,} has taken more than {self.limit:.0f} s, the median is {median:.2f} s: the job ends; "
            f"the ranks' stacks: {self._stacks('*')}"
        )
        if not outcome.report(HungError.exit_code, message):
            print(f"fusiontree: error: rank {self.world.rank}: {message}", file=sys.stderr, flush=True)
        time.sleep(_LAST_WORDS)
        self._record(step, message)
        os._exit(HungError.exit_code)  # the thread that trains answers no more

    def _record(self, step: int, message: str) -> None:
        """The incident, by the lowest rank that answers: some may not."""
        since = self._stacks(self.world.rank).stat().st_mtime - _LAST_WORDS
        paths = map(self._stacks, range(self.world.size))
        answers = [path.exists() and path.stat().st_mtime > since for path in paths]
        if answers.index(True) == self.world.rank:
            silent = [rank for rank, answer in enumerate(answers) if not answer]
            suffix = f"; no answer from rank {', '.join(map(str, silent))}" if silent else ""
            incidents.record(self.run_dir, "hang", step, message + suffix, silent=silent)

    def _stacks(self, rank: int | str) -> Path:
        return self.run_dir / LOGS / f"stacks-rank-{rank}.txt"
