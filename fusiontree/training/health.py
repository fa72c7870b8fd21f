"""Training health: skipped updates, loss spikes and hung steps."""

import contextlib
import faulthandler
import math
import os
import statistics
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

_ROWS_SHOWN = 4  # rows of a failing update in the console's message; the incident lists all
_MIN_DEVIATION = 0.005  # lower bound of the robust deviation, as a share of the median: even losses are no spikes
_MIN_TIMED_STEPS = 5  # steps to time before one can count as hung
_STACKS_SECONDS = 3.0  # time for all ranks to write their stacks before the first rank exits


class Trouble(NamedTuple):
    """A failing update and the action to take."""

    kind: Literal["skipped_update", "loss_spike"]
    message: str
    rows: tuple[int, int]  # rows consumed before and after the updates that a rollback skips
    action: Literal["continue", "rollback", "stop"]


class Health:
    """Judge of every update. It uses figures that all ranks share, so all ranks take the same action."""

    def __init__(self, config: HealthConfig):
        self.config = config
        self.skipped = 0  # updates skipped so far
        self.bad: list[tuple[int, int]] = []  # rows consumed before and after each of the latest consecutive skips
        self.losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, update: Update, rows: tuple[int, int]) -> Trouble | None:
        """Return the trouble with an update, or None.

        Args:
            update: the update.
            rows: rows consumed before and after it.
        """
        loss = update.loss
        if update.empty:  # padding or damaged rows only: there is nothing to roll back
            message = "no token to predict in this batch: update skipped"
            return Trouble("skipped_update", message, rows, "continue")
        if update.skipped:
            self.skipped += 1
            self.bad.append(rows)
            cause = f"gradient norm is {float(update.grad_norm)}" if math.isfinite(loss) else f"loss is {loss}"
            message = f"{cause}: update skipped, {len(self.bad)} in a row"
            action = self.config.on_bad if len(self.bad) >= self.config.max_bad_steps else "continue"
            return Trouble("skipped_update", message, (self.bad[0][0], rows[1]), action)
        self.bad.clear()
        score = robust_score(self.losses, loss) if len(self.losses) >= self.config.spike_window / 2 else 0.0
        median = statistics.median(self.losses) if self.losses else loss
        self.losses.append(loss)
        if score <= self.config.spike_score:
            return None
        message = f"loss {loss:.4f} is {score:.1f} robust deviations above the median {median:.4f}"
        return Trouble(
            "loss_spike", message, rows, "continue" if self.config.on_spike == "ignore" else self.config.on_spike
        )

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"skipped": self.skipped, "bad": self.bad, "losses": list(self.losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `to_json` returned."""
        self.skipped = state["skipped"]
        self.bad = [(first, end) for first, end in state["bad"]]
        self.losses = deque(state["losses"], self.config.spike_window)


def robust_score(values: "deque[float]", value: float) -> float:
    """Return the distance of `value` above the median of `values`, in units of 1.4826 median absolute deviations.

    The factor makes the unit one standard deviation if the values are normally distributed.
    """
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - median) for v in values)
    return (value - median) / max(deviation, _MIN_DEVIATION * abs(median))


def rows_of_failing_ranks(stream: TrainStream, rows_consumed: int, finite: bool) -> list[dict[str, Any]]:
    """Return the rows of the failing ranks in the step after `rows_consumed`; of all ranks if none failed. Collective.

    Args:
        stream: the training stream.
        rows_consumed: rows consumed before the step.
        finite: whether this rank's share of the loss is finite.

    Returns:
        Source, shard, row in the shard and first token in that row, for each row.
    """
    keys = ("source", "shard", "row", "first_token")
    own = [{key: row[key] for key in keys} for row in rows_at(stream, rows_consumed)]
    by_rank = collectives.gather((finite, own))
    failing = [rows for finite, rows in by_rank if not finite] or [rows for _, rows in by_rank]
    return [row for rows in failing for row in rows]


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the first few of `rows` for a line on the console."""
    shown = ", ".join(f"{row['shard']} row {row['row']} from token {row['first_token']}" for row in rows[:_ROWS_SHOWN])
    return shown + (f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else "")


class Watchdog:
    """Thread that ends this rank when a step takes far longer than the median step.

    Every rank runs one, so that every rank writes its stacks.
    """

    def __init__(self, config: HealthConfig, run_dir: Path, world: World):
        self.config, self.run_dir, self.world = config, run_dir, world
        self._durations: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self._running: tuple[float, int] | None = None  # start time and number of the running step
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
        """Time the block as step `number`."""
        began = time.monotonic()
        self._running = began, number
        try:
            yield
        finally:
            self._running = None
        self._durations.append(time.monotonic() - began)

    @property
    def limit(self) -> float:
        """Longest time that a step may take, in seconds."""
        if len(self._durations) < _MIN_TIMED_STEPS:  # the first steps compile; only collective timeouts limit them
            return math.inf
        return max(self.config.hang_seconds, self.config.hang_factor * statistics.median(self._durations))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.config.hang_seconds / 10)):
            running = self._running
            if running is not None and time.monotonic() - running[0] > self.limit:
                self._abort(running[1])

    def _abort(self, step: int) -> None:
        with open(self._stacks(self.world.rank), "w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        median = statistics.median(self._durations)
        message = (
            f"step {step + 1:,} has taken more than {self.limit:.0f} s (median {median:.2f} s), so the job ends; see "
            f"the ranks' stacks: {self._stacks('*')}"
        )
        outcome.announce(HungError.exit_code, message)
        time.sleep(_STACKS_SECONDS)
        self._record(step, message)
        os._exit(HungError.exit_code)  # an exception would not reach the hung training thread

    def _record(self, step: int, message: str) -> None:
        """Record the incident once: on the lowest rank that wrote its stacks."""
        since = self._stacks(self.world.rank).stat().st_mtime - _STACKS_SECONDS
        paths = map(self._stacks, range(self.world.size))
        answers = [path.exists() and path.stat().st_mtime > since for path in paths]
        if answers.index(True) == self.world.rank:
            silent = [rank for rank, answer in enumerate(answers) if not answer]
            suffix = f"; no answer from rank {', '.join(map(str, silent))}" if silent else ""
            incidents.record(self.run_dir, "hang", step, message + suffix, silent=silent)

    def _stacks(self, rank: int | str) -> Path:
        return self.run_dir / LOGS / f"stacks-rank-{rank}.txt"
