"""``incidents.jsonl`` of a run's folder: what went wrong or was out of the ordinary, one object a line.

The engine writes it; the status and the report of a run read it. Free of torch.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from fusiontree.files import read_json_lines

FILE = "incidents.jsonl"


def record(run_dir: Path, kind: str, step: int, message: str, **facts: Any) -> None:
    """Append an incident.

    Args:
        kind: a short name such as ``skipped_update``, ``rollback``, ``fallback``, ``signal``, ``hang``, ``resume``.
        step: updates done when it happened.
        message: one line for a person.
        facts: whatever else is known, as JSON.
    """
    line = json.dumps({"time": time.time(), "kind": kind, "step": step, "message": message, **facts}) + "\n"
    descriptor = os.open(run_dir / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())  # one write: lines of several ranks never mix
    finally:
        os.close(descriptor)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The incidents of a run, oldest first; a line that a crash or a full disk cut short is left out."""
    return read_json_lines(run_dir / FILE)
