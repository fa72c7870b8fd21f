"""Readers of documents for every kind of input file. Damaged input is reported with a reason, never raised.

In plain text and JSON lines, damage affects single documents, and only those are skipped. A damaged compressed file,
tar or Parquet file cannot be trusted anywhere: such containers are read to their end first, and skipped if damaged.
"""

import contextlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

from data_tools.bounded import (
    BLOCK_BYTES,
    DAMAGED,
    Member,
    open_compressed,
    read_all,
    read_lines,
    read_parts,
    read_tar,
)
from data_tools.inputs import TextFile
from data_tools.options import InputOptions
from fusiontree.errors import RunError, UserError, short_cause

TOO_SHORT, TOO_LONG = "shorter than --min-chars", "longer than --max-chars"


@dataclass(frozen=True)
class Record:
    """A document before decoding, or the reason why it cannot be read."""

    file: str  # name of the file
    id_suffix: str  # identifies the document in its file; "" if the file is one document
    place: str  # the same, for people; "" if the record is the complete file
    content: bytes = b""
    is_json: bool = False
    fault: str = ""  # reason why the record cannot be read; "" if it can
    bytes_read: int = 0  # of the file, up to and including this record

    @property
    def id(self) -> str:
        """The document's id."""
        return f"{self.file}{self.id_suffix}"


class Rejected(Exception):  # noqa: N818 - an outcome, not an error
    """The reason why a record is not a document."""


def require_readers(files: Iterable[TextFile]) -> None:
    """Raise UserError if a Parquet file is given and pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        for file in files:
            if file.kind == "parquet":
                raise UserError(
                    f"{file.path} needs pyarrow; run pip install 'fusiontree[parquet]', or pass --exclude '*.parquet'"
                )


def is_container(file: TextFile) -> bool:
    """Return whether damage anywhere invalidates the complete file, and `find_fault` has to read all of it."""
    return bool(file.compression) or file.kind in ("parquet", "tar")


def find_fault(file: TextFile, options: InputOptions) -> str:
    """Check a file, a container to its end; return its fault, or "" if it has none."""
    if file.size == 0:
        return "empty"
    try:
        if file.kind == "parquet":
            _check_parquet(file, options)
        else:
            with _open(file) as (_, stream):
                if file.kind == "tar":
                    for _ in read_tar(stream):
                        pass
                elif is_container(file):
                    while stream.read(BLOCK_BYTES):
                        pass
    except PermissionError:
        return "permission denied"
    except DAMAGED as error:
        return f"unreadable {file.compression or file.kind}: {short_cause(error)}"
    return ""


def read_records(file: TextFile, options: InputOptions, fault: str) -> Iterator[Record]:
    """Yield the records of a file, or a single record with the `fault` that `find_fault` returned.

    Raises:
        RunError: the file changed since `find_fault` checked it.
    """
    if fault:
        return iter([Record(file.name, "", "", fault=fault, bytes_read=file.size)])
    return _require_unchanged(file, _READERS[file.kind](file, options))


def _require_unchanged(file: TextFile, found: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from found
    except DAMAGED as error:
        raise RunError(
            f"{file.path} changed while it was being read ({short_cause(error)}); run the command again"
        ) from None


def extract_text(record: Record, options: InputOptions) -> str:
    """Return the text of a record.

    Raises:
        Rejected: there is no text, or its length is outside the limits.
    """
    if record.fault:
        raise Rejected(record.fault)
    try:
        text = record.content.decode()
    except UnicodeDecodeError as error:
        line = record.content.count(b"\n", 0, error.start) + 1
        raise Rejected("not UTF-8" if record.place else f"not UTF-8 (line {line}, byte {error.start})") from None
    text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
    if record.is_json:
        text = _json_text(text, options.text_key)
    if not text:
        raise Rejected("empty")
    if len(text) < options.min_chars:
        raise Rejected(TOO_SHORT)
    if len(text) > options.char_limit:
        raise Rejected(TOO_LONG)
    return text


def _json_text(line: str, key: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise Rejected("not valid JSON") from None
    if not isinstance(values, dict):
        raise Rejected("not a JSON object")
    if key not in values:
        raise Rejected(f"no key {key!r} (keys: {', '.join(sorted(values)[:6])})")
    text = values[key]
    if not isinstance(text, str):
        raise Rejected(f"{key!r} is not a string")
    try:
        if not text.isascii():  # O(1), and spares the copy
            text.encode()
    except UnicodeEncodeError:  # an escape such as \ud800 without its second half
        raise Rejected("unpaired surrogate") from None
    return text


# --- kinds -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(file: TextFile) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """Yield the raw file, whose position is the progress in bytes, and the decompressed stream."""
    with open(file.path, "rb", buffering=BLOCK_BYTES) as raw:
        if file.compression:
            with open_compressed(raw, file.compression) as stream:
                yield raw, stream
        else:
            yield raw, raw


def _read_jsonl(file: TextFile, options: InputOptions) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        for number, line in enumerate(read_lines(stream, options.record_bytes), 1):
            if line is None or not line.isspace():
                yield _record(file, f":{number}", f"line {number}", line, options, is_json=True, bytes_read=raw.tell())


def _read_text(file: TextFile, options: InputOptions) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        if options.separator is None:
            yield _record(file, "", "", read_all(stream, options.record_bytes), options, bytes_read=file.size)
            return
        line = 1
        separator = options.separator.encode()
        for number, (content, newlines) in enumerate(read_parts(stream, separator, options.record_bytes), 1):
            if content is None or (content and not content.isspace()):
                place = f"document {number}, line {line}"
                yield _record(file, f":{number}", place, content, options, bytes_read=raw.tell())
            line += newlines + separator.count(b"\n")


def _record(
    file: TextFile,
    id_suffix: str,
    place: str,
    content: bytes | None,
    options: InputOptions,
    is_json: bool = False,
    bytes_read: int = 0,
) -> Record:
    """Return the record of `content`; None: it has more than `options.record_bytes` bytes."""
    fault = f"more than {options.record_bytes:,} bytes" if content is None else ""
    return Record(file.name, id_suffix, place, content or b"", is_json, fault, bytes_read)


def _read_parquet(file: TextFile, options: InputOptions) -> Iterator[Record]:
    for number, (content, bytes_read) in enumerate(_parquet_column(file, options.text_key)):
        fault = "null" if content is None else ""
        yield Record(file.name, f":{number}", f"row {number}", content or b"", fault=fault, bytes_read=bytes_read)


def _parquet_column(file: TextFile, name: str) -> Iterator[tuple[bytes | None, int]]:
    """Yield the texts of a column as bytes, None for null, each with the estimated bytes of the file read so far."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
        done, rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=256, columns=[name], use_threads=False):
            done += len(batch)
            for value in batch.column(0):  # one by one: a dictionary's texts would be repeated in a list of them
                while value.is_valid and not hasattr(value, "as_buffer"):  # of a dictionary or an extension
                    value = value.value
                yield value.as_buffer().to_pybytes() if value.is_valid else None, file.size * done // rows


def _check_parquet(file: TextFile, options: InputOptions) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if options.text_key not in names:
            raise ValueError(f"no column {options.text_key!r} (columns: {', '.join(names[:6])})")
        kind = table.schema_arrow.field(options.text_key).type
        if not _is_text(kind):
            raise ValueError(f"column {options.text_key!r} has type {kind}, not string")
    for _ in _parquet_column(file, options.text_key):
        pass


def _is_text(kind: Any) -> bool:
    """Return whether an Arrow type is text, as any engine may write it: also bytes, whose UTF-8 is checked by row."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in names)


def _read_tar(file: TextFile, options: InputOptions) -> Iterator[Record]:
    """Yield one document per WebDataset sample: its `.txt`, else the text in its `.json`."""
    with _open(file) as (raw, stream):
        for key, members in itertools.groupby(read_tar(stream), _sample_key):
            ending, content = "", None  # of the best member so far
            for member in members:
                found = member.name[len(key) :]
                if found == ".txt" != ending or (found == ".json" and not ending):
                    ending, content = found, member.read(options.record_bytes)
            if ending:
                place, is_json = f"member {key}{ending}", ending == ".json"
                yield _record(file, f"/{key}", place, content, options, is_json, bytes_read=raw.tell())
            else:
                yield Record(file.name, f"/{key}", f"sample {key}", fault="neither .txt nor .json")


def _sample_key(member: Member) -> str:
    """Return the key that WebDataset groups members by: the name up to the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


_READERS: dict[str, Callable[[TextFile, InputOptions], Iterator[Record]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tar": _read_tar,
}
