"""A job on this machine, started through DeepSpeed's launcher and supervised by ``fusiontree launch``.

The processes form a chain, in one process group that ends with the job::

    fusiontree launch               `run`
      deepspeed.launcher.runner     reads the resources; exits with the launcher's code
        deepspeed.launcher.launch   starts the ranks; polls them every second
          fusiontree train          rank 0, 1, ...

The chain loses most exit codes and signals:

| event                           | exit code of the chain       | here                                             |
|---------------------------------|------------------------------|--------------------------------------------------|
| every rank exits with 0         | 0                            | 0                                                |
| a rank exits with N > 0         | N of the first one polled    | code and message of the first report             |
| a rank dies of signal N         | 256 - N                      | error that names the rank and the signal         |
| a rank aborts after its report  | 256 - 6, a failure           | 0: the work was done                             |
| SIGINT or SIGTERM to the chain  | 1; ranks killed after 30 s   | only ranks get signals; their code, `GRACE`      |
| the launcher is killed          | 0; ranks survive             | error; the process group is killed               |
| a rank fails, others still run  | others killed after 30 s     | others killed after `FAILURE_GRACE`              |
| ``fusiontree launch`` is killed | ranks survive                | ranks save and exit (`launcher.join`)            |

So the exit codes come from the ranks' own reports in the launch folder (`launcher.rank_reports`), a lock per rank shows
whether the rank is alive, and DeepSpeed's code counts only if no report explains the end.
"""

import contextlib
import ctypes
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
from fusiontree.errors import RunError, StoppedError, from_exit_code
from launcher import rank_reports
from launcher.job import Plan
from launcher.join import GRACE, LAUNCH_LOCK

FAILURE_GRACE = 8.0  # seconds that the other ranks have to end after one has failed
POLL_INTERVAL = 0.2  # seconds between two polls of the ranks
_LAST_LINES = 10  # of the log of a rank that died without an exit report
_REAP_SECONDS = 5.0  # time for killed ranks to end; one that waits for a hung disk takes longer
_PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_STOPS = (signal.SIGINT, signal.SIGTERM)
_FORWARDED = (*_STOPS, signal.SIGUSR1)


def render(plan: Plan) -> list[str]:
    """Return the command that starts `plan` through DeepSpeed's launcher."""
    if plan.devices is None:
        resources = ["--num_nodes", str(plan.nodes), "--num_gpus", str(plan.ranks_per_node)]
    else:  # with --num_gpus, DeepSpeed ignores CUDA_VISIBLE_DEVICES and takes the first GPUs
        resources = ["--include", f"localhost:{','.join(map(str, plan.devices))}"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, *resources]
    rendezvous = ["--master_addr", plan.master_address, "--master_port", str(plan.master_port)]
    setup = ["bash", "-c", "\n".join(["set -e", *plan.setup, 'exec "$@"']), "setup"] if plan.setup else []
    # at level `error`, which --quiet also sets, DeepSpeed adds a line of its own for each failing rank
    return [*setup, *runner, *rendezvous, "--log_level", "critical", "--no_local_rank", "--module", *plan.program]


def command_line(plan: Plan) -> str:
    """Return the command of `run` as one line to paste into a shell."""
    return shlex.join(["env", *(f"{key}={value}" for key, value in plan.environment.items()), *render(plan)])


def run(plan: Plan, logs: Path | None = None) -> int:
    """Run `plan` to its end and return its exit code: 0 if every rank succeeded, else the first failing rank's.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to all ranks. After SIGINT or SIGTERM, ranks are killed once `GRACE`
    seconds have passed or a second signal comes. After SIGUSR1, which also asks the ranks to save and exit, they have
    unlimited time. After a rank has failed, the others have `FAILURE_GRACE` seconds.

    Args:
        plan: the job.
        logs: folder with rank-N.log; its last lines are printed if rank N dies without an exit report.

    Raises:
        UserError, RunError: the first failing rank reported it, or a rank died without an exit report.
        KeyboardInterrupt: stopped by SIGINT; no rank is left.
    """
    with tempfile.TemporaryDirectory(prefix="fusiontree-launch-") as name:
        folder = Path(name)
        with open(folder / LAUNCH_LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            end = _supervise(plan, folder)
        reports = rank_reports.read(folder)
    if end.dead_rank is not None and logs is not None:
        _print_last_lines(logs / f"rank-{end.dead_rank}.log")
    return _exit_code(reports, plan.world_size, *end)


class _End(NamedTuple):
    """The end of a job as its supervisor saw it."""

    returned: int  # exit code of DeepSpeed's runner
    stopped_by: int | None = None  # the first signal that asked the job to stop
    starting: bool = False  # whether some ranks had not started by then
    dead_rank: int | None = None  # the rank that ended first, if it wrote no exit report


class _SignalForwarder:
    """Signal handler that forwards to the ranks and sets the deadline by which they must have ended.

    The signals bypass DeepSpeed's launcher: it would kill the ranks after 30 seconds, in the middle of a save.
    """

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        self.signal: int | None = None  # the first one that asked the job to stop
        self.starting = False  # whether it came before all ranks had started
        self.since = 0.0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: object) -> None:
        now, started = time.monotonic(), rank_reports.process_ids(self.folder)
        if len(started) < self.ranks:  # training has not begun: nothing to save
            self.signal, self.starting, self.since, self.deadline = number, True, now, now
        elif number in _STOPS and self.signal is None:
            self.signal, self.since, self.deadline = number, now, now + GRACE
        elif number in _STOPS and now - self.since > REPEAT:
            self.deadline = now
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # this rank has ended
                os.kill(process, number)


def _supervise(plan: Plan, folder: Path) -> _End:
    """Run `plan` in a process group of its own, with `folder` as the launch folder of its ranks."""
    environment = {**os.environ, **plan.environment, LAUNCH_FOLDER: str(folder)}
    _adopt_orphans(True)
    process = subprocess.Popen(
        render(plan), env=environment, start_new_session=True, preexec_fn=ignore_forwarded_signals
    )
    forwarder, failed, dead_rank = _SignalForwarder(folder, plan.world_size), False, None
    with handling_signals(forwarder):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    returned = process.wait(timeout=POLL_INTERVAL)
                    return _End(returned, forwarder.signal, forwarder.starting, dead_rank)
                if not failed:
                    failed, dead_rank = _find_failure(folder)
                    if failed:
                        forwarder.deadline = min(forwarder.deadline, time.monotonic() + FAILURE_GRACE)
                if time.monotonic() > forwarder.deadline:
                    signal_group(process.pid, signal.SIGKILL)
        finally:
            signal_group(process.pid, signal.SIGKILL)  # orphans: data workers, ranks of a killed launcher
            process.wait()
            _reap(process.pid)
            _adopt_orphans(False)


def _adopt_orphans(adopt: bool) -> None:
    """Make this process the parent of its descendants' orphans: the first process of a container may not reap them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _reap(group: int) -> None:
    """Reap the killed children in process group `group`, so that no rank stays as a zombie."""
    deadline = time.monotonic() + _REAP_SECONDS
    with contextlib.suppress(ChildProcessError):  # no child is left
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG) == (0, 0):
                time.sleep(0.02)


def _find_failure(folder: Path) -> tuple[bool, int | None]:
    """Return whether a rank has failed, and the rank that died if no report names the cause."""
    failed = rank_reports.failures(rank_reports.read(folder))
    if rank_reports.includes_cause(failed):
        return True, None
    for path in sorted(folder.glob("running-*")):
        rank = int(path.name.removeprefix("running-"))
        if _is_unlocked(path) and not (folder / f"rank-{rank}.json").exists():
            return True, rank
    return bool(failed), None


def _is_unlocked(path: Path) -> bool:
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _print_last_lines(path: Path) -> None:
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        print(f"the last lines of {path}:", *lines, sep="\n  ", file=sys.stderr)


def ignore_forwarded_signals() -> None:
    """Ignore the signals that are forwarded to the ranks; DeepSpeed's runner would exit before its ranks have saved."""
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def handling_signals(handler: Any) -> Iterator[None]:
    """Install `handler` for the signals that are forwarded to the ranks, and restore the previous handlers."""
    previous = {number: signal.signal(number, handler) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signal_group(group: int, number: int) -> None:
    """Send signal `number` to process group `group`, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _exit_code(
    reports: list[dict[str, Any]],
    ranks: int,
    returned: int,
    stopped_by: int | None,
    starting: bool = False,
    dead_rank: int | None = None,
) -> int:
    """Return the job's exit code from the ranks' reports or, without one that explains the end, DeepSpeed's code."""
    failures = rank_reports.failures(reports)
    if len(reports) == ranks and not failures:
        return 0  # also if a rank aborted after its report, during the interpreter's shutdown
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if failures and dead_rank is None:
        shared = len(reports) == ranks and len({report["message"] for report in reports}) == 1
        return _raise_or_return(failures[0], shared)
    if stopped_by is not None and starting:
        raise StoppedError(f"stopped by {signal.Signals(stopped_by).name} before the first step; start again")
    if stopped_by is not None:
        raise RunError(
            f"stopped by {signal.Signals(stopped_by).name}; start again to resume from the newest checkpoint"
        )
    if 0 < returned < 128 and not failures:
        return returned  # the rank failed before it could report, and printed the reason
    raise RunError(f"{_cause_of_death(returned, dead_rank)}, and start again")


def _raise_or_return(failure: dict[str, Any], shared: bool) -> int:
    code, message = failure["code"], failure["message"]
    if message is None:
        return int(code)  # the rank printed a traceback
    raise from_exit_code(code, message if shared else f"rank {failure['rank']}: {message}")


def _cause_of_death(returned: int, dead_rank: int | None) -> str:
    rank = "a rank" if dead_rank is None else f"rank {dead_rank}"
    if 256 - returned == signal.SIGKILL:
        return f"{rank} was killed by SIGKILL, often for lack of memory; free memory or lower batch.micro_rows"
    if 256 - returned in set(signal.Signals):
        return f"{rank} was killed by {signal.Signals(256 - returned).name}; see the logs in the run's folder"
    if dead_rank is not None:
        return f"{rank} died without an exit report, often for lack of memory; see the logs in the run's folder"
    return f"DeepSpeed's launcher was killed (code {returned}) with its ranks; see the logs in the run's folder"
