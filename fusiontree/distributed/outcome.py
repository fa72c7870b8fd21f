"""Exit reports of ranks, read by the launch that started them."""

import json
import os
import time
from pathlib import Path

from fusiontree.files import write_atomic

LAUNCH_FOLDER = "FUSIONTREE_LAUNCH"  # environment variable: the folder that ranks share with their launch


def report(code: int, message: str | None) -> bool:
    """Report how this rank ended; return false if no launch started it, or if the launch is gone."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if folder is None or not Path(folder).is_dir():
        return False
    rank = int(os.environ.get("RANK", "0"))
    content = {"rank": rank, "host": os.uname().nodename, "code": code, "message": message, "time": time.time_ns()}
    write_atomic(Path(folder) / f"rank-{rank}.json", json.dumps(content))
    return True
