"""``incidents.jsonl`` of a run's folder: what went wrong or was out of the ordinary, one object a line.

The engine writes it; the status and the report of a run read it. Free of torch.
"""

import functools
import time
from pathlib import Path
from typing import Any

from fusiontree.run.folder import INCIDENTS_FILE
from fusiontree.run.jsonlines import JsonLines, read_json_lines


def record(run_dir: Path, kind: str, step: int, message: str, **facts: Any) -> None:
    """Append an incident.

    Args:
        kind: a short name such as ``skipped_update``, ``rollback``, ``fallback``, ``signal``, ``hang``, ``resume``.
        step: updates done when it happened.
        message: one line for a person.
        facts: whatever else is known, as JSON.
    """
    _lines(run_dir).add({"time": time.time(), "kind": kind, "step": step, "message": message, **facts})


def flush(run_dir: Path) -> None:
    """Write those that could not be written when they happened: the next one may be days away."""
    _lines(run_dir).flush()


@functools.cache
def _lines(run_dir: Path) -> JsonLines:
    return JsonLines(run_dir / INCIDENTS_FILE)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The incidents of a run, oldest first; a line that a crash or a full disk cut short is left out."""
    return read_json_lines(run_dir / INCIDENTS_FILE)
