"""Files and folders that appear under their final name whole, or not at all; files of JSON lines, which grow."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.console import console
from fusiontree.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make the entries of `folder` (creations, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` through a synced temporary file beside it, so that readers see the old or the new."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


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


def refuse_existing(target: Path, overwrite: bool, marker: str) -> None:
    """Refuse an output folder that holds something else.

    Args:
        target: the folder that is to be made.
        overwrite: whether one that holds a file named `marker`, so one of the same kind, may be replaced.
        marker: as above.

    Raises:
        UserError: it may not be made.
    """
    if target.is_file():
        raise UserError(f"output {target} is a file; name a folder")
    if target.resolve() == Path.cwd():
        raise UserError(f"output {target} is the current folder; name one inside it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise UserError(f"output folder {target} already holds something else (no {marker} there); name another")
    if not overwrite:
        raise UserError(f"output folder {target} already holds something; name another or pass --overwrite")


@contextlib.contextmanager
def staged_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends well and is removed otherwise.

    Raises:
        UserError: see `refuse_existing`.
    """
    refuse_existing(target, overwrite, marker)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_folder(target.parent)


@contextlib.contextmanager
def resumable_folder(target: Path, overwrite: bool, marker: str, state: Sequence[str]) -> Iterator[Path]:
    """Like `staged_folder`, but what a block has left behind, even one that was killed, is there again the next time.

    Args:
        target: the folder that is to be made.
        overwrite: see `refuse_existing`.
        marker: see `refuse_existing`.
        state: files that a block keeps to go on from and that end with it; without the first, what an interrupted block
            leaves is of no use and removed.

    Raises:
        UserError: see `refuse_existing`; or another process is making this folder.
    """
    refuse_existing(target, overwrite, marker)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is making {target}; wait for it, or name another output") from None
        try:
            yield partial
            _sync(partial)  # takes long where there are many files, so the state outlives it
            for name in state:
                (partial / name).unlink(missing_ok=True)
            _put_in_place(partial, target)
        finally:
            if not (partial / state[0]).exists():
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)
    fsync_folder(target.parent)


def _sync(folder: Path) -> None:
    """Make the content of all files under `folder` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def _put_in_place(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`; what had it goes last, and comes back if that fails."""
    retired = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    try:
        if target.exists():
            os.replace(target, retired)
        os.replace(partial, target)
    except BaseException:
        if retired.exists() and not target.exists():
            os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)
