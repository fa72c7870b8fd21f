"""Discovery of input files: expansion of folders and patterns, unique names, and a fixed order. No file is opened."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from data_tools.options import InputOptions
from fusiontree.errors import UserError, short_cause

Kind = Literal["text", "jsonl", "parquet", "tar"]

_EXCLUDED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_TARS = {".tgz": "gz", ".txz": "xz", ".tbz2": "bz2"}
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}


@dataclass(frozen=True)
class TextFile:
    """A file that may contain documents."""

    name: str  # path relative to its input, or the path as given if several files share that; forward slashes
    path: Path
    kind: Kind
    compression: str  # "gz", "zst", "xz", "bz2" or ""
    size: int  # bytes
    mtime_ns: int


@dataclass
class SkippedInput:
    """A skipped file, or the documents of one file that were skipped for the same reason."""

    path: str
    reason: str
    count: int = 1  # skipped documents; 1 for a file
    places: list[str] = field(default_factory=list)  # where the first of the documents are; empty for a file

    def to_json(self) -> dict[str, Any]:
        """Return the entry as written to the manifest and to the figures."""
        where = {"count": self.count, "places": self.places} if self.places else {}
        return {"path": self.path, "reason": self.reason, **where}


def find_files(
    inputs: Sequence[Path | str], options: InputOptions | None = None
) -> tuple[list[TextFile], list[SkippedInput]]:
    """Return the files under `inputs`, and the entries that are not readable files.

    The order is that of `inputs`, then by name within each. Folders are read recursively, without hidden entries,
    `__pycache__`, `site-packages`, `dist-packages` and links to folders. A file reached twice is returned once. Names
    are unique.

    Args:
        inputs: files, folders, or glob patterns (`**` crosses folders).
        options: `include` and `exclude` are matched against a file's name and against the last part of the name.

    Raises:
        UserError: an input is missing, or no file remains.
    """
    options = options or InputOptions()
    names: dict[Path, str] = {}
    files: set[Path] = set()
    reasons: dict[Path, str] = {}  # entries that are not files
    seen: set[str] = set()
    for root in _expand(inputs):
        for name, path in [(root.name, root)] if not root.is_dir() else _walk(root, names, reasons):
            if not _is_selected(name, options) or (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            names[path] = name
            if path.is_file():  # opening a pipe would block forever; a broken link has no content
                files.add(path)
            else:
                reasons[path] = "not a regular file"
    if not files:
        where = ", ".join(map(str, inputs))
        raise UserError(
            f"no documents in {where} ({len(reasons)} entries skipped); check the path, --include and --exclude"
        )
    names = _unique_names(names)
    found = [_text_file(name, path) for path, name in names.items() if path in files]
    return found, [SkippedInput(names[path], reason) for path, reason in reasons.items()]


def _unique_names(names: dict[Path, str]) -> dict[Path, str]:
    """Return names by path, in the same order, with every shared name replaced by the path as given."""
    # a path as given can equal another file's name, hence the loop
    while shared := {name for name, count in Counter(names.values()).items() if count > 1}:
        names = {path: path.as_posix() if name in shared else name for path, name in names.items()}
    return names


def _text_file(name: str, path: Path) -> TextFile:
    stat = path.stat()
    return TextFile(name, path, *_kind_and_compression(path.name), stat.st_size, stat.st_mtime_ns)


def _expand(inputs: Sequence[Path | str]) -> Iterator[Path]:
    """Yield the existing paths; expand the patterns."""
    for given in map(str, inputs):
        if os.path.lexists(given):
            yield Path(given)
        elif glob.has_magic(given):
            matches = sorted(glob.glob(given, recursive=True))
            if not matches:
                raise UserError(
                    f"input pattern {given} matches nothing; check it, and quote it to keep the shell from expanding it"
                )
            yield from map(Path, matches)
        else:
            raise UserError(f"input {given} does not exist; give files, folders or glob patterns")


def _walk(root: Path, names: dict[Path, str], reasons: dict[Path, str]) -> list[tuple[str, Path]]:
    """Return (name, path) of the visible files under `root`; links to folders are not followed, which avoids loops.

    An unreadable folder is added to `names` and `reasons`.
    """
    found = []

    def record_unreadable(error: OSError) -> None:
        path = Path(error.filename)
        names[path], reasons[path] = path.relative_to(root).as_posix(), f"folder cannot be read: {short_cause(error)}"

    for folder, folders, files in os.walk(root, onerror=record_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _EXCLUDED_FOLDERS]
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _is_selected(name: str, options: InputOptions) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in patterns for text in (name, name.rpartition("/")[2]))

    return (not options.include or matches(options.include)) and not matches(options.exclude)


def _kind_and_compression(name: str) -> tuple[Kind, str]:
    """Derive kind and compression from a file's name; a compressed `.json` is JSON lines, a plain one is text."""
    stem, ending = os.path.splitext(name.lower())
    if ending in _TARS:
        return "tar", _TARS[ending]
    compression = _COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
        if ending == ".json":
            return "jsonl", compression
    return _KINDS.get(ending, "text"), compression
