"""``incidents.jsonl`` of a run's folder: failures and unusual events, one object per line. Free of torch.

Training writes it; the status and the report of a run read it.
"""

import functools
import time
from pathlib import Path
from typing import Any

from fusiontree.run.folder import INCIDENTS_FILE
from fusiontree.run.jsonlines import JsonLines, read_lines
from fusiontree.run.state_files import Count, Stored, Time, parse_stored


class _Incident(Stored):
    time: Time
    kind: str
    step: Count
    message: str


def record(run_dir: Path, kind: str, step: int, message: str, **facts: Any) -> None:
    """Append an incident.

    Args:
        run_dir: the run's folder.
        kind: a short name such as ``skipped_update``, ``rollback``, ``fallback``, ``signal``, ``hang``, ``resume``.
        step: updates done.
        message: one line for a person.
        facts: further values, serializable as JSON.
    """
    _lines(run_dir).add({"time": time.time(), "kind": kind, "step": step, "message": message, **facts})


def flush(run_dir: Path) -> None:
    """Retry incidents that could not be written, because the next incident may be days away."""
    _lines(run_dir).flush()


@functools.cache
def _lines(run_dir: Path) -> JsonLines:
    return JsonLines(run_dir / INCIDENTS_FILE)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the incidents of a run, oldest first; damaged lines are named and skipped."""
    return [incident for _, incident in read_lines(run_dir / INCIDENTS_FILE, _parse)]


def _parse(line: bytes) -> dict[str, Any]:
    return parse_stored(line, _Incident).model_dump()
