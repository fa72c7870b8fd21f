"""The documents that a command's inputs name: UTF-8 text files, each a document."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fusiontree.errors import RunError, UserError

_NEVER_ENTERED = {"__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """A file of text."""

    id: str  # path relative to the input that led to it, with forward slashes
    path: Path
    size: int  # bytes

    def text(self) -> str:
        """The whole text, line ends untouched.

        Raises:
            RunError: it is no longer the UTF-8 that was found.
        """
        try:
            return self.path.read_bytes().decode("utf-8")
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path} changed while it was being read ({error}); run again") from None


@dataclass(frozen=True)
class Skipped:
    """An input left out."""

    path: str
    reason: str


def find_documents(
    inputs: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Document], list[Skipped]]:
    """All documents under `inputs`, sorted by id, and the files that are none, with the reason.

    Folders are read recursively, without hidden entries, `__pycache__`, `site-packages`, `dist-packages` and links to
    folders. A file reached twice counts once. Every file is read, so that what follows may count on its text.

    Args:
        inputs: files or folders.
        include: glob patterns; if any are given, a file's id or name must match one.
        exclude: glob patterns that neither may match.

    Raises:
        UserError: an input is missing, or nothing is left.
    """
    found: list[Document] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for root in inputs:
        if not root.exists():
            raise UserError(f"input {root} does not exist; give files or folders of text")
        for name, path in [(root.name, root)] if root.is_file() else _walk(root, skipped):
            if not _selected(name, include, exclude) or (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            size, reason = _examine(path)
            if reason:
                skipped.append(Skipped(name, reason))
            else:
                found.append(Document(name, path, size))
    if not found:
        where = ", ".join(map(str, inputs))
        raise UserError(f"no documents in {where} ({len(skipped)} files skipped); check the path, --include, --exclude")
    return sorted(found, key=lambda document: document.id), sorted(skipped, key=lambda entry: entry.path)


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Path]]:
    """(id, path) of the visible files under `root`; links to folders are not followed, so there are no loops."""

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(os.path.relpath(error.filename, root), f"folder cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NEVER_ENTERED)
        for name in sorted(files):
            if not name.startswith("."):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in patterns for text in (name, name.rpartition("/")[2]))

    return (not include or matches(include)) and not matches(exclude)


def _examine(path: Path) -> tuple[int, str]:
    """Size of a file in bytes, and why it is no document ("" if it is one)."""
    if not path.is_file():  # a pipe would block for ever, a broken link has nothing to read
        return 0, "not a regular file"
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except PermissionError:
        return 0, "no permission to read it"
    except UnicodeDecodeError as error:
        return len(content), f"not UTF-8 (byte {error.start})"
    return len(content), "" if content else "empty"
