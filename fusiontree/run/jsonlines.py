"""Append-only files of JSON lines. A crash or a full disk truncates at most one line."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusiontree.console import console
from fusiontree.errors import short_cause


class JsonLines:
    """Writer of a file of JSON lines. Lines that a full disk rejects are queued and written before the next line."""

    def __init__(self, path: Path):
        self.path = path
        self._queue: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append an object, after any queued lines."""
        with self._lock:
            self._queue.append(json.dumps(line).encode() + b"\n")
            error = self._write()
            if error is not None and len(self._queue) == 1:
                console.print(
                    f"{self.path}: {short_cause(error)}; lines are queued until they can be written", markup=False
                )

    def flush(self) -> None:
        """Try to write the queued lines."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Try to write the queued lines one last time; print how many are lost."""
        with self._lock:
            error = self._write()
            if error is not None:
                lost = len(self._queue)
                console.print(f"{self.path}: {short_cause(error)}; its last {lost} lines are lost", markup=False)

    def _write(self) -> OSError | None:
        """Write the queued lines in order until one fails; return its error."""
        try:
            while self._queue:
                _append(self.path, self._queue[0])
                del self._queue[0]
        except OSError as error:
            return error
        return None


def _append(path: Path, line: bytes) -> None:
    """Append `line` in a single write, so that lines of several processes never mix; first end a truncated line."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = b"\n" * is_cut + line
        if (
            os.write(descriptor, content) < len(content) - 1
        ):  # a missing newline alone is no loss: the next line adds it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines without truncated lines; an empty list if the file is missing."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
