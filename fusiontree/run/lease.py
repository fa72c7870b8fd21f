"""Whose a run's folder is: the newest start of the run holds it. Free of torch.

A start may be cut off from the rest of its job and live on, while the job starts again elsewhere, on the same files. So
each start takes the lease, and what it would put under a final name it does only while it still holds it; until then
what it writes bears its own mark.
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

ME = uuid.uuid4().hex  # this process, unlike any other on any host


def take(run_dir: Path) -> None:
    """Make this process the holder of the run; any other loses it."""
    holder = {"holder": ME, "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
    write_atomic(run_dir / LEASE_FILE, json.dumps(holder | {"job": os.environ.get("SLURM_JOB_ID")}))


def read(run_dir: Path) -> dict[str, Any] | None:
    """Who holds the run: host, pid, time since then (s since the epoch), job of SLURM; None if it never started."""
    path = run_dir / LEASE_FILE
    return json.loads(path.read_text()) if path.exists() else None


def check(run_dir: Path) -> None:
    """Raise RunError if another start of the run has taken it over since this process took it."""
    holder = read(run_dir)
    if holder is not None and holder["holder"] != ME:
        raise RunError(
            f"{run_dir} is now written by a newer start on {holder['host']} (pid {holder['pid']}); this one ends"
        )


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder still runs; None where that cannot be seen from this host."""
    if holder["host"] != os.uname().nodename:
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
