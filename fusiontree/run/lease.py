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
from typing import Any

from fusiontree.errors import RunError
from fusiontree.files import write_atomic
from fusiontree.run.folder import LEASE_FILE

TOKEN = uuid.uuid4().hex  # identifies this process among all processes on all hosts


def take(run_dir: Path) -> None:
    """Make this process the holder of the run; the previous holder loses the lease."""
    holder = {"holder": TOKEN, "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
    write_atomic(run_dir / LEASE_FILE, json.dumps(holder | {"job": os.environ.get("SLURM_JOB_ID")}))


def read(run_dir: Path) -> dict[str, Any] | None:
    """Return the holder: token, host, pid, time (s since the epoch), SLURM job; None if the run never started."""
    path = run_dir / LEASE_FILE
    return json.loads(path.read_text()) if path.exists() else None


def check(run_dir: Path) -> None:
    """Raise RunError if a newer start of the run has taken the lease from this process."""
    holder = read(run_dir)
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
