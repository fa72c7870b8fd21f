"""The rank's side of a launch: its start report, its liveness lock, and its end when the launch dies."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from fusiontree.distributed.environment import number
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.files import write_atomic
from launcher import heartbeat

GRACE = 120.0  # seconds between the request to stop and SIGKILL: the rest of a step, and a checkpoint
LAUNCH_LOCK = "alive"  # file in a local launch's folder, locked while `launcher.local.run` is alive
_open_locks: list[Any] = []  # keeps this rank's liveness lock open until the process ends


def join_launcher() -> None:
    """Report this rank as started, restore ignored signals, and watch the launch; call it first on each rank.

    Without a launch, this does nothing. A rank that handles stop requests does so before it is reported as started.
    """
    if LAUNCH_FOLDER not in os.environ:
        return
    folder, rank = Path(os.environ[LAUNCH_FOLDER]), number("RANK", 0)
    # lock the file before it gets its final name: the launch takes an unlocked running-N for a dead rank
    _open_locks.append(open(folder / f".running-{rank}", "w"))  # noqa: SIM115
    fcntl.flock(_open_locks[0], fcntl.LOCK_EX)
    os.replace(folder / f".running-{rank}", folder / f"running-{rank}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    write_atomic(folder / f"rank-{rank}.started", f"{os.uname().nodename} {os.getpid()}")
    # neither file exists under SLURM, which ends the ranks of a job itself
    if (folder / LAUNCH_LOCK).exists():  # the launch is on this machine
        threading.Thread(target=_end_with_launch, args=(folder,), name="launch-watch", daemon=True).start()
    if (folder / heartbeat.FILE).exists():  # the launch is on another machine
        threading.Thread(target=heartbeat.watch, args=(folder, GRACE), name="launch-watch", daemon=True).start()


def _end_with_launch(folder: Path) -> None:
    with open(folder / LAUNCH_LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # blocks until the launch releases its lock, also by being killed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
