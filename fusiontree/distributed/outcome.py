"""How a rank tells the launch that started it how it ended."""

import json
import os
import time
from pathlib import Path

from fusiontree.files import write_atomic

LAUNCH_FOLDER = "FUSIONTREE_LAUNCH"  # environment: the folder a rank shares with the launch


def report(code: int, message: str | None) -> bool:
    """Tell the launch how this rank ended; false if none has started it, or if that is gone."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if folder is None or not Path(folder).is_dir():
        return False
    rank = int(os.environ.get("RANK", "0"))
    content = {"rank": rank, "host": os.uname().nodename, "code": code, "message": message, "time": time.time_ns()}
    write_atomic(Path(folder) / f"rank-{rank}.json", json.dumps(content))
    return True
