"""Exit reports of ranks, read by the launch that started them."""

import json
import os
import sys
import time
from pathlib import Path

from fusiontree.files import write_atomic

LAUNCH_FOLDER = "FUSIONTREE_LAUNCH"  # environment variable: the folder that ranks share with their launch


def report(code: int, message: str | None) -> bool:
    """Report how this rank ended; return false if no launch started it, or if the launch is gone."""
    folder, rank = os.environ.get(LAUNCH_FOLDER), os.environ.get("RANK", "0")
    if folder is None or not Path(folder).is_dir() or not rank.isdecimal():
        return False
    content = {"rank": int(rank), "host": os.uname().nodename, "code": code, "message": message, "time": time.time_ns()}
    write_atomic(Path(folder) / f"rank-{rank}.json", json.dumps(content))
    return True


def announce(code: int, message: str) -> None:
    """Report how this rank ends; print the message if no launch does."""
    if not report(code, message):
        print(f"fusiontree: error: rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr, flush=True)
