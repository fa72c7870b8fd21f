"""A job on this machine, through DeepSpeed's launcher, with what that leaves out.

DeepSpeed starts a runner, the runner a launcher, the launcher the ranks. That chain hands on the positive exit code of
the first rank it sees fail, and little more: death by signal N becomes 256 - N; a stop asked for by signal becomes 1,
whatever the ranks answer, and after half a minute their death; a killed launcher becomes 0; a rank that aborts after
its work is done becomes a failure; ranks outlive a chain that is killed; and when one rank has failed, the others have
half a minute. So each rank reports its own end in a folder it shares with `run`, holds a lock there that shows whether
it still lives, and watches another that shows whether `run` does; signals go to the ranks past the chain; and the whole
chain stands in a process group that `run` ends.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.distributed.signals import REPEAT
from fusiontree.errors import RunError, from_exit_code
from launcher import rank_reports
from launcher.job import Plan
from launcher.join import ALIVE, GRACE

ENDING = 8.0  # seconds that the other ranks have to end when one has failed
LOOK = 0.2  # seconds between two looks at how they are doing
_LAST_LINES = 10  # of a rank's log, shown when it died without a word
_STOPS = (signal.SIGINT, signal.SIGTERM)
_FORWARDED = (*_STOPS, signal.SIGUSR1)


# --- the launching side ----------------------------------------------------------------------------------------------


def render(plan: Plan) -> list[str]:
    """The command that starts `plan` through DeepSpeed's launcher."""
    if plan.devices is None:
        where = ["--num_nodes", str(plan.nodes), "--num_gpus", str(plan.ranks_per_node)]
    else:  # told a number, DeepSpeed would forget CUDA_VISIBLE_DEVICES and take the first GPUs
        where = ["--include", f"localhost:{','.join(map(str, plan.devices))}"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, *where]
    rendezvous = ["--master_addr", plan.master_address, "--master_port", str(plan.master_port)]
    setup = ["bash", "-c", "\n".join(["set -e", *plan.setup, 'exec "$@"']), "setup"] if plan.setup else []
    # at level `error`, and so with --quiet, it would add a line of its own to each failing rank's
    return [*setup, *runner, *rendezvous, "--log_level", "critical", "--no_local_rank", "--module", *plan.program]


def command_line(plan: Plan) -> str:
    """What `run` would start, as one line to paste into a shell."""
    return shlex.join(["env", *(f"{key}={value}" for key, value in plan.environment.items()), *render(plan)])


def run(plan: Plan, logs: Path | None = None) -> int:
    """Run `plan` to its end and return its exit code: 0 when every rank ended well, else the first failing rank's.

    SIGINT, SIGTERM and SIGUSR1 go to all ranks; after the first two, what still runs `GRACE` seconds later, or when
    another one comes, is killed. For SIGUSR1, which asks the ranks to save and leave too, they may take their time.
    When a rank fails, the others have `ENDING` seconds.

    Args:
        plan: the job.
        logs: folder with rank-N.log, of which the last lines are shown if rank N dies without a word.

    Raises:
        UserError, RunError: what the first failing rank said, or that a rank died without a word.
        KeyboardInterrupt: stopped by SIGINT; all ranks are gone.
    """
    with tempfile.TemporaryDirectory(prefix="fusiontree-launch-") as name:
        folder = Path(name)
        with open(folder / ALIVE, "w") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            end = _supervise(plan, folder)
        said = rank_reports.read(folder)
    if end.silent is not None and logs is not None:
        _show_last_lines(logs / f"rank-{end.silent}.log")
    return _verdict(said, plan.world_size, *end)


class _End(NamedTuple):
    """How a job ended, seen from outside."""

    returned: int  # by DeepSpeed's launcher
    stopped_by: int | None = None  # the first signal that asked it to stop
    silent: int | None = None  # the rank that ended first, if it did not say why


class _Stop:
    """Hands a job's signals on to its ranks, and holds when those must have ended that are asked to.

    To the ranks alone: DeepSpeed's launcher, told as well, kills them half a minute later, whatever they have to save.
    """

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        self.signal: int | None = None  # the first that asked to stop
        self.since = 0.0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: object) -> None:
        now, begun = time.monotonic(), rank_reports.processes(self.folder)
        if len(begun) < self.ranks:  # there is nothing to save yet
            self.signal, self.since, self.deadline = number, now, now
        elif number in _STOPS and self.signal is None:
            self.signal, self.since, self.deadline = number, now, now + GRACE
        elif number in _STOPS and now - self.since > REPEAT:
            self.deadline = now
        for rank in begun:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(rank, number)


def _supervise(plan: Plan, folder: Path) -> _End:
    """Run `plan` in a process group of its own; its ranks report to `folder`."""
    environment = {**os.environ, **plan.environment, LAUNCH_FOLDER: str(folder)}
    process = subprocess.Popen(
        render(plan), env=environment, start_new_session=True, preexec_fn=leave_signals_to_the_ranks
    )
    stop, failed, silent = _Stop(folder, plan.world_size), False, None
    with handling(stop):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return _End(process.wait(timeout=LOOK), stop.signal, silent)
                if not failed:
                    failed, silent = _failed(folder)
                    if failed:
                        stop.deadline = min(stop.deadline, time.monotonic() + ENDING)
                if time.monotonic() > stop.deadline:
                    signal_group(process.pid, signal.SIGKILL)
        finally:
            signal_group(process.pid, signal.SIGKILL)  # whatever the chain has left behind
            process.wait()


def _failed(folder: Path) -> tuple[bool, int | None]:
    """Whether a rank has failed, and which one if none has said why."""
    failed = rank_reports.failures(rank_reports.read(folder))
    if rank_reports.names_a_cause(failed):
        return True, None
    for path in sorted(folder.glob("running-*")):
        rank = int(path.name.removeprefix("running-"))
        if _is_free(path) and not (folder / f"rank-{rank}.json").exists():
            return True, rank
    return bool(failed), None


def _is_free(path: Path) -> bool:
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _show_last_lines(path: Path) -> None:
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        print(f"the last lines of {path}:", *lines, sep="\n  ", file=sys.stderr)


def leave_signals_to_the_ranks() -> None:
    """Make the chain ignore what is forwarded: its runner would die, with a traceback, before its ranks have ended."""
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def handling(handler: Any) -> Iterator[None]:
    """Let `handler` have what is forwarded to the ranks."""
    previous = {number: signal.signal(number, handler) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signal_group(group: int, number: int) -> None:
    """Send signal `number` to process group `group`, if it is still there."""
    with contextlib.suppress(ProcessLookupError):  # the group has ended: there is nothing left to tell
        os.killpg(group, number)


def _verdict(
    said: list[dict[str, Any]], ranks: int, returned: int, stopped_by: int | None, silent: int | None = None
) -> int:
    """The job's exit code, from what the ranks reported and, where they could not, from what DeepSpeed returned."""
    failures = rank_reports.failures(said)
    if len(said) == ranks and not failures:
        return 0  # also when a rank aborted afterwards, in the interpreter's shutdown
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if failures and silent is None:
        shared = len(said) == ranks and len({report["message"] for report in said}) == 1
        return _raise_or_return(failures[0], shared)
    if stopped_by is not None:
        raise RunError(f"stopped by {signal.Signals(stopped_by).name}; the last checkpoint is where it goes on from")
    if 0 < returned < 128 and not failures:
        return returned  # the rank has written why before it could report
    raise RunError(f"{_cause(returned, silent)}, then start again")


def _raise_or_return(failure: dict[str, Any], shared: bool) -> int:
    code, message = failure["code"], failure["message"]
    if message is None:
        return int(code)  # its traceback has been shown
    raise from_exit_code(code, message if shared else f"rank {failure['rank']}: {message}")


def _cause(returned: int, silent: int | None) -> str:
    who = "a rank" if silent is None else f"rank {silent}"
    if 256 - returned == signal.SIGKILL:
        return f"{who} was killed by SIGKILL, often for want of memory; free some or lower batch.micro_rows"
    if 256 - returned in set(signal.Signals):
        return f"{who} was killed by {signal.Signals(256 - returned).name}; see the logs in the run's folder"
    if silent is not None:
        return f"{who} died without a word, often killed for want of memory; see the logs in the run's folder"
    return f"DeepSpeed's launcher was killed (code {returned}), and its ranks with it; see the logs in the run's folder"


# --- the rank's side -------------------------------------------------------------------------------------------------
