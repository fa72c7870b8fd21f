"""Lease of a run's folder: fencing against stale starts of the run. Free of torch.

After a network partition a stale start may still be running while the job has been restarted elsewhere, on the same
files. So each start takes the lease, and checks it before it publishes a file under its final name. Until then, its
files carry its token.
"""

import json
import os
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fusiontree.errors import RunError, short_cause
from fusiontree.files import write_atomic
from fusiontree.run.folder import LEASE_FILE
from fusiontree.run.state_files import DamagedError, Stored, Time, read_stored

TOKEN = uuid.uuid4().hex  # identifies this process among all processes on all hosts


class _Holder(Stored):
    holder: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    time: Time
    job: str | None = None


def take(run_dir: Path) -> None:
    """Make this process the holder of the run; the previous holder loses the lease."""
    holder = {"holder": TOKEN, "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
    write_atomic(run_dir / LEASE_FILE, json.dumps(holder | {"job": os.environ.get("SLURM_JOB_ID")}))


def read(run_dir: Path) -> dict[str, Any] | None:
    """Return the holder: token, host, pid, time (s since the epoch), SLURM job; None if the run never started.

    Raises:
        DamagedError: the lease is damaged.
    """
    try:
        return read_stored(run_dir / LEASE_FILE, _Holder).model_dump()
    except FileNotFoundError:
        return None


def check(run_dir: Path) -> None:
    """Check that no newer start of the run has taken the lease from this process.

    Raises:
        RunError: one has; or the lease is damaged, so that this process may not be the newest start.
    """
    try:
        holder = read(run_dir)
    except DamagedError as error:
        raise RunError(
            f"{run_dir / LEASE_FILE} is damaged ({short_cause(error)}), so a newer attempt may be writing; start again "
            "to resume"
        ) from None
    if holder is not None and holder["holder"] != TOKEN:
        raise RunError(
            f"{run_dir} is now written by a newer attempt on {holder['host']} (pid {holder['pid']}); this one ends"
        )


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Return whether the holder is still running; None if it is on another host."""
    if holder["host"] != os.uname().nodename:
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
