"""The files that a command's inputs name: found, told apart by their names, in one order; none is opened here."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from fusiontree.errors import UserError

Kind = Literal["text", "jsonl", "parquet", "tar"]

_NEVER_ENTERED = {"__pycache__", "site-packages", "dist-packages"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_TARS = {".tgz": "gz", ".txz": "xz", ".tbz2": "bz2"}
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}


@dataclass(frozen=True)
class TextFile:
    """A file that may hold documents."""

    name: str  # path relative to the input that led to it, or as given where others share that; forward slashes
    path: Path
    kind: Kind
    compression: str  # "gz", "zst", "xz", "bz2" or ""
    size: int  # bytes
    mtime_ns: int


@dataclass
class Skipped:
    """An input left out, or some of its documents."""

    path: str
    reason: str
    count: int = 1  # documents; 1 if it is the file
    places: list[str] = field(default_factory=list)  # the first few of them in the file; none if it is the file

    def to_json(self) -> dict[str, Any]:
        """As the manifest and the figures have it."""
        where = {"count": self.count, "places": self.places} if self.places else {}
        return {"path": self.path, "reason": self.reason, **where}


def find_files(
    inputs: Sequence[Path | str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[TextFile], list[Skipped]]:
    """All files under `inputs`, in the order of the inputs and sorted by name in each, and what is no file.

    Folders are read recursively, without hidden entries, `__pycache__`, `site-packages`, `dist-packages` and links to
    folders. A file reached twice counts once. No two have the same name.

    Args:
        inputs: files, folders, or glob patterns (`**` crosses folders).
        include: glob patterns; if any are given, a file's name or the last part of it must match one.
        exclude: glob patterns that neither may match.

    Raises:
        UserError: an input is missing, or nothing is left.
    """
    names: dict[Path, str] = {}
    files: set[Path] = set()
    reasons: dict[Path, str] = {}  # why it is no file
    seen: set[str] = set()
    for root in _roots(inputs):
        for name, path in [(root.name, root)] if not root.is_dir() else _walk(root, names, reasons):
            if not _selected(name, include, exclude) or (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            names[path] = name
            if path.is_file():  # a pipe would block for ever, a broken link has nothing to read
                files.add(path)
            else:
                reasons[path] = "not a regular file"
    if not files:
        where = ", ".join(map(str, inputs))
        raise UserError(f"no documents in {where} ({len(reasons)} files skipped); check the path, --include, --exclude")
    names = _told_apart(names)
    found = [_text_file(name, path) for path, name in names.items() if path in files]
    return found, [Skipped(names[path], reason) for path, reason in reasons.items()]


def _told_apart(names: dict[Path, str]) -> dict[Path, str]:
    """Names by path, in the same order: where several would share one, each is called by its path as given."""
    while shared := {name for name, count in Counter(names.values()).items() if count > 1}:
        names = {path: path.as_posix() if name in shared else name for path, name in names.items()}
    return names


def _text_file(name: str, path: Path) -> TextFile:
    about = path.stat()
    return TextFile(name, path, *_kind(path.name), about.st_size, about.st_mtime_ns)


def _roots(inputs: Sequence[Path | str]) -> Iterator[Path]:
    for given in map(str, inputs):
        if os.path.lexists(given):
            yield Path(given)
        elif glob.has_magic(given):
            matches = sorted(glob.glob(given, recursive=True))
            if not matches:
                raise UserError(f"input pattern {given} matches nothing; check it, and quote it against the shell")
            yield from map(Path, matches)
        else:
            raise UserError(f"input {given} does not exist; give files, folders or glob patterns")


def _walk(root: Path, names: dict[Path, str], reasons: dict[Path, str]) -> list[tuple[str, Path]]:
    """(name, path) of the visible files under `root`; links to folders are not followed, so there are no loops.

    A folder that cannot be read is added to `names` and `reasons`.
    """
    found = []

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        names[path], reasons[path] = path.relative_to(root).as_posix(), f"folder cannot be read: {error.strerror}"

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _NEVER_ENTERED]
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in patterns for text in (name, name.rpartition("/")[2]))

    return (not include or matches(include)) and not matches(exclude)


def _kind(name: str) -> tuple[Kind, str]:
    """What a file's name says of its content: `.json` alone is a text, compressed it is a dump of JSON lines."""
    stem, ending = os.path.splitext(name.lower())
    if ending in _TARS:
        return "tar", _TARS[ending]
    compression = _COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
        if ending == ".json":
            return "jsonl", compression
    return _KINDS.get(ending, "text"), compression
