"""The rank's side of a launch: it shows that it is alive and ends with its launcher."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.files import write_atomic
from launcher import heartbeat

GRACE = 120.0  # seconds between the request to stop and the kill: what is left of a step, and a checkpoint
ALIVE = "alive"  # in the folder that ranks share with `run`: locked for as long as that lives
_held: list[Any] = []  # the lock that shows that this rank lives, until it ends


def join_launcher() -> None:
    """Called first on each rank: takes signals again and ends this process when the `run` that started it is gone."""
    if LAUNCH_FOLDER not in os.environ:
        return
    folder, rank = Path(os.environ[LAUNCH_FOLDER]), os.environ.get("RANK", "0")
    _held.append(open(folder / f".running-{rank}", "w"))  # noqa: SIM115
    fcntl.flock(_held[0], fcntl.LOCK_EX)
    os.replace(folder / f".running-{rank}", folder / f"running-{rank}")  # seen before, it would be free: a death
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    write_atomic(folder / f"rank-{rank}.started", f"{os.uname().nodename} {os.getpid()}")
    if (folder / ALIVE).exists():  # SLURM ends its ranks itself
        threading.Thread(target=_end_with_launcher, args=(folder,), name="launcher-watch", daemon=True).start()
    if (folder / heartbeat.FILE).exists():  # it is on another machine
        threading.Thread(target=heartbeat.watch, args=(folder, GRACE), name="launcher-watch", daemon=True).start()


def _end_with_launcher(folder: Path) -> None:
    with open(folder / ALIVE) as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)  # returns when `run` has let go of it, however it ended
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
