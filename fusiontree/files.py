"""Atomic creation of files and folders: they are complete under their final name, or absent."""

import contextlib
import fcntl
import json
import os
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Sync the entries of `folder`: creations and renames."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to a synced temporary file and rename it to `path`: readers see the old content or the new."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
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


def has_control_characters(text: str) -> bool:
    """Return whether `text` contains a control character, a line separator or an undecodable byte.

    Names and paths with one of them cannot be passed to other programs, or printed, in one line.
    """
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def read_text(path: Path) -> str:
    """Return the contents of a text file that a user names.

    Raises:
        UserError: it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; name another file, or save it as UTF-8") from None


def plain_files(folder: Path) -> list[Path]:
    """Return the files in `folder`, at any depth.

    Raises:
        UserError: `folder` is a link or contains one, which could lead to any file of this machine.
    """
    found = sorted(folder.rglob("*"))
    for path in (folder, *found):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a link or no file; replace it by the file itself")
    return [path for path in found if path.is_file()]


def copy_files(source: Path, target: Path) -> None:
    """Copy the files in `source` to `target`, each atomically; other files in `target` stay.

    Raises:
        UserError: see `plain_files`.
    """
    for path in plain_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(copied, path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def refuse_below_file(target: Path) -> None:
    """Raise UserError if one of the parent folders of `target` is a file."""
    for parent in target.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"output {target} would be below {parent}, which is a file; name another")


def refuse_existing(target: Path, overwrite: bool, marker: str) -> None:
    """Refuse an output folder with other contents.

    Args:
        target: the folder to create.
        overwrite: replace an existing folder of the same kind, which has a file named `marker`.
        marker: see `overwrite`.

    Raises:
        UserError: `target` cannot be created.
    """
    if target.is_file():
        raise UserError(f"output {target} is a file; name a folder")
    refuse_below_file(target)
    if target.resolve() == Path.cwd():
        raise UserError(f"output {target} is the current folder; name one inside it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise UserError(f"output folder {target} has other contents (no {marker}); name another")
    if not overwrite:
        raise UserError(f"output folder {target} is not empty; name another or pass --overwrite")


@contextlib.contextmanager
def staged_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `target` if the block succeeds, and removed if it raises.

    Raises:
        UserError: see `resumable_folder`.
    """
    with resumable_folder(target, overwrite, marker, state=()) as partial:
        yield partial


@contextlib.contextmanager
def resumable_folder(target: Path, overwrite: bool, marker: str, state: Sequence[str]) -> Iterator[Path]:
    """Yield a folder as `staged_folder` does, but keep partial output after an interruption, for the next call.

    Args:
        target: the folder to create.
        overwrite: see `refuse_existing`.
        marker: see `refuse_existing`.
        state: files from which a block resumes; they are removed when it succeeds. Partial output without the first of
            them cannot be resumed, and is removed at the end of the block or by the next call.

    Raises:
        UserError: see `refuse_existing`; or another process is creating this folder.
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
            raise UserError(f"another process is creating {target}; wait for it, or name another output") from None
        if not _can_resume(partial, state):
            _empty(partial)
        try:
            yield partial
            _sync(partial)  # slow with many files; the state is removed after it, to stay resumable until then
            for name in state:
                (partial / name).unlink(missing_ok=True)
            _put_in_place(partial, target)
        finally:
            if not _can_resume(partial, state):
                shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty any more
                    for parent in new_parents:
                        parent.rmdir()
    finally:
        os.close(descriptor)
    fsync_folder(target.parent)


def _can_resume(partial: Path, state: Sequence[str]) -> bool:
    """Return whether a block can resume from the contents of `partial`."""
    return bool(state) and (partial / state[0]).exists()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: Path) -> None:
    """Sync the contents of all files in `folder`, at any depth."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an existing target is removed last, and restored if the rename fails."""
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
