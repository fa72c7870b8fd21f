"""A job on this machine, through DeepSpeed's launcher, with what that leaves out.

DeepSpeed starts a runner, the runner a launcher, the launcher the ranks. That chain hands on the positive exit code of
the first rank it sees fail, and little more: death by signal N becomes 256 - N; a stop asked for by signal becomes 1,
whatever the ranks answer; a killed launcher becomes 0; a rank that aborts after its work is done becomes a failure; and
ranks outlive a chain that is killed. So each rank reports its own end in a folder it shares with `run`, watches a lock
there that shows whether `run` still lives, and the whole chain stands in a process group that `run` ends.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.errors import HungError, RunError, StoppedError, UserError
from fusiontree.files import write_atomic
from fusiontree.signals import REPEAT
from launcher import beat
from launcher.plan import Plan

GRACE = 120.0  # seconds between the request to stop and the kill: what is left of a step, and a checkpoint
_FOLDER = "FUSIONTREE_LAUNCH"  # environment: the folder a rank shares with `run`
_ALIVE = "alive"  # in that folder: locked for as long as `run` lives
_STOPS = (signal.SIGINT, signal.SIGTERM)
_FORWARDED = (*_STOPS, signal.SIGUSR1)
_KINDS = {kind.exit_code: kind for kind in (UserError, RunError, StoppedError, HungError)}


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


def run(plan: Plan) -> int:
    """Run `plan` to its end and return its exit code: 0 when every rank ended well, else the first failing rank's.

    SIGINT, SIGTERM and SIGUSR1 go to all ranks; after the first two, what still runs `GRACE` seconds later, or when
    another one comes, is killed. For SIGUSR1, which asks the ranks to save and leave too, they may take their time.

    Raises:
        UserError, RunError: what the first failing rank said, or that a rank died without a word.
        KeyboardInterrupt: stopped by SIGINT; all ranks are gone.
    """
    with tempfile.TemporaryDirectory(prefix="fusiontree-launch-") as name:
        folder = Path(name)
        with open(folder / _ALIVE, "w") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            returned, stopped_by = _supervise(render(plan), {**os.environ, **plan.environment, _FOLDER: name})
        reports = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    return _verdict(reports, plan.world_size, returned, stopped_by)


def _supervise(argv: list[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Run `argv` in a process group of its own; its return code and the signal that asked it to stop."""
    process = subprocess.Popen(argv, env=environment, start_new_session=True, preexec_fn=_leave_signals_to_the_ranks)
    stop: dict[str, Any] = {"signal": None, "deadline": float("inf")}

    def forward(number: int, frame: object) -> None:
        now = time.monotonic()
        if number in _STOPS and stop["signal"] is None:
            stop.update(signal=number, since=now, deadline=now + GRACE)
        elif number in _STOPS and now - stop["since"] > REPEAT:
            stop.update(deadline=now)
        _signal_group(process.pid, number)

    with _handlers(forward):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.2), stop["signal"]
                if time.monotonic() > stop["deadline"]:
                    _signal_group(process.pid, signal.SIGKILL)
        finally:
            _signal_group(process.pid, signal.SIGKILL)  # whatever the chain has left behind
            process.wait()


def _leave_signals_to_the_ranks() -> None:
    """Make the chain ignore what is forwarded: its runner would die, with a traceback, before its ranks have ended."""
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group has ended: there is nothing left to tell
        os.killpg(group, number)


def _verdict(reports: list[dict[str, Any]], ranks: int, returned: int, stopped_by: int | None) -> int:
    """The job's exit code, from what the ranks reported and, where they could not, from what DeepSpeed returned."""
    failures = sorted((report for report in reports if report["code"]), key=lambda report: report["time"])
    if len(reports) == ranks and not failures:
        return 0  # also when a rank aborted afterwards, in the interpreter's shutdown
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if failures:
        shared = len(reports) == ranks and len({report["message"] for report in reports}) == 1
        return _raise_or_return(failures[0], shared)
    if stopped_by is not None:
        raise RunError(f"stopped by {signal.Signals(stopped_by).name}; the last checkpoint is where it goes on from")
    if 0 < returned < 128:
        return returned  # the rank has written why before it could report
    raise RunError(f"{_cause(returned)}, then start again")


def _raise_or_return(failure: dict[str, Any], shared: bool) -> int:
    code, message = failure["code"], failure["message"]
    if message is None:
        return int(code)  # its traceback has been shown
    kind = _KINDS.get(code, RunError)
    raise kind(message if shared else f"rank {failure['rank']}: {message}")


def _cause(returned: int) -> str:
    if 256 - returned == signal.SIGKILL:
        return "a rank was killed by SIGKILL, often for want of memory; free some or lower batch.micro_rows"
    if 256 - returned in set(signal.Signals):
        return f"a rank was killed by {signal.Signals(256 - returned).name}; see the logs in the run's folder"
    return f"DeepSpeed's launcher was killed (code {returned}), and its ranks with it; see the logs in the run's folder"


# --- the rank's side -------------------------------------------------------------------------------------------------


def join_launcher() -> None:
    """Called first on each rank: takes signals again and ends this process when the `run` that started it is gone."""
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:  # Open MPI's names
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{name}"]
        os.environ["WORLD_SIZE"] = os.environ["OMPI_COMM_WORLD_SIZE"]
    folder = os.environ.get(_FOLDER)
    if folder is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if Path(folder).is_dir():
        (Path(folder) / f"rank-{os.environ.get('RANK', '0')}.joined").write_text(f"{os.uname().nodename} {os.getpid()}")
    if (Path(folder) / _ALIVE).exists():  # SLURM ends its ranks itself
        threading.Thread(target=_end_with_launcher, args=(Path(folder),), name="launcher-watch", daemon=True).start()
    if (Path(folder) / beat.FILE).exists():  # it is on another machine
        threading.Thread(target=beat.watch, args=(Path(folder), GRACE), name="launcher-watch", daemon=True).start()


def _end_with_launcher(folder: Path) -> None:
    with open(folder / _ALIVE) as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)  # returns when `run` has let go of it, however it ended
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def report(code: int, message: str | None) -> bool:
    """Tell `run` how this rank ended; false if no `run` has started it, or if that is gone."""
    folder = os.environ.get(_FOLDER)
    if folder is None or not Path(folder).is_dir():
        return False
    rank = int(os.environ.get("RANK", "0"))
    content = {"rank": rank, "host": os.uname().nodename, "code": code, "message": message, "time": time.time_ns()}
    write_atomic(Path(folder) / f"rank-{rank}.json", json.dumps(content))
    return True
