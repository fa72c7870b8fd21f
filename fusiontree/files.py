"""Files and folders that appear under their final name whole, or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


def parse_json(text: str | bytes) -> Any:
    """What JSON says; ValueError where it is none, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def refuse_below_a_file(target: Path) -> None:
    """Raise UserError if a folder that `target` would lie in is a file."""
    for parent in target.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"output {target} would lie in {parent}, which is a file; name another")


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
    refuse_below_a_file(target)
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
        UserError: see `resumable_folder`.
    """
    with resumable_folder(target, overwrite, marker, state=()) as partial:
        yield partial


@contextlib.contextmanager
def resumable_folder(target: Path, overwrite: bool, marker: str, state: Sequence[str]) -> Iterator[Path]:
    """Like `staged_folder`, but what a block has left behind, even one that was killed, is there again the next time.

    Args:
        target: the folder that is to be made.
        overwrite: see `refuse_existing`.
        marker: see `refuse_existing`.
        state: files that a block keeps to go on from and that end with it; without the first, what an interrupted block
            leaves is of no use and removed, at the latest by the next.

    Raises:
        UserError: see `refuse_existing`; or another process is making this folder.
    """
    refuse_existing(target, overwrite, marker)
    target = target.resolve()
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is making {target}; wait for it, or name another output") from None
        if not _goes_on(partial, state):
            _empty(partial)
        try:
            yield partial
            _sync(partial)  # takes long where there are many files, so the state outlives it
            for name in state:
                (partial / name).unlink(missing_ok=True)
            _put_in_place(partial, target)
        finally:
            if not _goes_on(partial, state):
                shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):  # something lies there by now
                    for parent in new_parents:
                        parent.rmdir()
    finally:
        os.close(descriptor)
    fsync_folder(target.parent)


def _goes_on(partial: Path, state: Sequence[str]) -> bool:
    """Whether a block can go on from what lies in `partial`."""
    return bool(state) and (partial / state[0]).exists()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
