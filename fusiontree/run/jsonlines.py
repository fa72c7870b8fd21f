"""Files of JSON lines, which grow: a full disk or a crash costs them no line but the one that it cuts short."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusiontree.console import console


class JsonLines:
    """Adds to a file of JSON lines. What a full disk refuses is said, waits, and is written before the next."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append an object, once those that wait are written."""
        with self._lock:
            self._waiting.append(json.dumps(line).encode() + b"\n")
            error = self._write()
            if error is not None and len(self._waiting) == 1:
                console.print(f"{self.path}: {error.strerror}; its lines wait until they can be written", markup=False)

    def flush(self) -> None:
        """Write what waits, if it can be."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write what waits, now or never."""
        with self._lock:
            error = self._write()
            if error is not None:
                lost = len(self._waiting)
                console.print(f"{self.path}: {error.strerror}; its last {lost} lines are lost", markup=False)

    def _write(self) -> OSError | None:
        """Write what waits, in order, as far as it can be; why it cannot."""
        try:
            while self._waiting:
                _append(self.path, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            return error
        return None


def _append(path: Path, line: bytes) -> None:
    """Append in one write, for those of several processes never mix, behind the end of a line that was cut short."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = b"\n" * is_cut + line
        if os.write(descriptor, content) < len(content) - 1:  # its end alone the next one makes up for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none if there is no file; a line that a crash or a full disk cut short is
    left out.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
