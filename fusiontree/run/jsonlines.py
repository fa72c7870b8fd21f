"""Append-only files of JSON lines. A crash or a full disk truncates at most one line; damaged lines are skipped."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fusiontree.console import console
from fusiontree.errors import short_cause
from fusiontree.run.state_files import DamagedError, open_regular

T = TypeVar("T")
_MAX_LINE = 2**24  # bytes; the longest lines list the rows of a failing update


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
                console.print(f"{self.path}: {short_cause(error)}; lines are queued until they can be written")

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
                console.print(f"{self.path}: {short_cause(error)}; its last {lost} lines are lost")

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


def read_lines(path: Path, parse: Callable[[bytes], T]) -> Iterator[tuple[bytes, T]]:
    """Yield each line of a file of JSON lines, and the record in it, in constant memory.

    Lines that are no records are skipped; after the last line their number, and the first one's, are printed. A last
    line without its end is skipped in silence: it is being written, or a crash has cut it.

    Args:
        path: the file; a missing one has no lines.
        parse: returns the record in a line; raises DamagedError if there is none.
    """
    number, skipped, first = 0, 0, ""
    try:
        with open_regular(path) as stream:
            while line := stream.readline(_MAX_LINE):
                number += 1
                if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                    reason: str | None = f"it is longer than {_MAX_LINE:,} bytes"
                    while (rest := stream.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                else:
                    try:
                        record = parse(line)
                    except DamagedError as error:
                        reason = short_cause(error) if line.endswith(b"\n") else None
                    else:
                        yield line, record
                        continue
                if reason is not None:
                    first = first or f"line {number}: {reason}"
                    skipped += 1
    except FileNotFoundError:
        return
    except DamagedError as error:
        console.print(f"{path} is damaged ({short_cause(error)}); its records are left out")
        return
    if skipped:
        kind = "a damaged line is" if skipped == 1 else f"{skipped:,} damaged lines are"
        console.print(f"{path}: {kind} skipped ({first})")
