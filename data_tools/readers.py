"""Readers of documents for every kind of input file. Damaged input is reported with a reason, never raised.

In plain text and JSON lines, damage affects single documents, and only those are skipped. A damaged compressed file,
tar or Parquet file cannot be trusted anywhere: such containers are read to their end first, and skipped if damaged.
"""

import bz2
import contextlib
import gzip
import importlib.util
import itertools
import json
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np

from data_tools.inputs import TextFile
from data_tools.options import InputOptions
from fusiontree.errors import RunError, UserError, short_cause

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TOO_SHORT, TOO_LONG = "shorter than --min-chars", "longer than --max-chars"
_BLOCK_BYTES = 1 << 20  # per read
_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": gzip.open,
    "zst": zstd.open,
    "xz": lzma.open,
    "bz2": bz2.open,
}
_DAMAGED = (
    *(EOFError, OSError, ValueError, NotImplementedError),
    *(zlib.error, zstd.ZstdError, lzma.LZMAError, tarfile.TarError),
)


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
        elif file.kind == "tar":
            _check_tar(file)
        else:
            with _open(file) as (_, stream):
                while is_container(file) and stream.read(_BLOCK_BYTES):
                    pass
    except PermissionError:
        return "permission denied"
    except _DAMAGED as error:
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
    except _DAMAGED as error:
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
    if options.max_chars is not None and len(text) > options.max_chars:
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
def _open(file: TextFile) -> Iterator[tuple[BinaryIO, Any]]:
    """Yield the raw file, whose position is the progress in bytes, and the decompressed stream."""
    with open(file.path, "rb", buffering=_BLOCK_BYTES) as raw:
        if file.compression:
            with _DECOMPRESS[file.compression](raw) as stream:
                yield raw, stream
        else:
            yield raw, raw


def _read_jsonl(file: TextFile, _: InputOptions) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield Record(file.name, f":{number}", f"line {number}", line, is_json=True, bytes_read=raw.tell())


def _read_text(file: TextFile, options: InputOptions) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        if options.separator is None:
            yield Record(file.name, "", "", stream.read(), bytes_read=file.size)
            return
        line = 1
        separator = options.separator.encode()
        for number, content in enumerate(_split(stream, separator), 1):
            if content and not content.isspace():
                yield Record(file.name, f":{number}", f"document {number}, line {line}", content, bytes_read=raw.tell())
            line += (content + separator).count(b"\n")


def _split(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the parts between the separators; the file is read in blocks, so it may exceed the memory."""
    rest = b""
    # a read at least doubles `rest`: with fixed blocks, searching one long document would take quadratic time
    while block := stream.read(max(_BLOCK_BYTES, len(rest))):
        *complete, rest = (rest + block).split(separator)
        yield from complete
    yield rest


def _read_parquet(file: TextFile, options: InputOptions) -> Iterator[Record]:
    for number, (text, bytes_read) in enumerate(_parquet_column(file, options.text_key)):
        content, fault = (b"", "null") if text is None else (text.encode(), "")
        yield Record(file.name, f":{number}", f"row {number}", content, fault=fault, bytes_read=bytes_read)


def _parquet_column(file: TextFile, name: str) -> Iterator[tuple[str | None, int]]:
    """Yield the texts of a column, each with the estimated bytes of the file read so far."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
        done, rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=256, columns=[name], use_threads=False):
            done += len(batch)
            for text in batch.column(0).to_pylist():
                yield text, file.size * done // rows


def _check_parquet(file: TextFile, options: InputOptions) -> None:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if options.text_key not in names:
            raise ValueError(f"no column {options.text_key!r} (columns: {', '.join(names[:6])})")
        kind = table.schema_arrow.field(options.text_key).type
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(values) or pyarrow.types.is_large_string(values)):
            raise ValueError(f"column {options.text_key!r} has type {kind}, not string")
    for _ in _parquet_column(file, options.text_key):
        pass


def _read_tar(file: TextFile, _: InputOptions) -> Iterator[Record]:
    """Yield one document per WebDataset sample: its `.txt`, else the text in its `.json`."""
    with _open(file) as (raw, stream), tarfile.open(fileobj=stream, mode="r:") as tar:
        for key, sample in itertools.groupby((member for member in tar if member.isfile()), _sample_key):
            members = {member.name[len(key) :]: member for member in sample}
            chosen = next((members[ending] for ending in (".txt", ".json") if ending in members), None)
            if chosen is None:
                yield Record(file.name, f"/{key}", f"sample {key}", fault="neither .txt nor .json")
                continue
            content = tar.extractfile(chosen)
            assert content is not None, chosen.name
            text, is_json = content.read(), chosen.name.endswith(".json")
            yield Record(file.name, f"/{key}", f"member {chosen.name}", text, is_json, bytes_read=raw.tell())


def _sample_key(member: tarfile.TarInfo) -> str:
    """Return the key that WebDataset groups members by: the name up to the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _check_tar(file: TextFile) -> None:
    """Check an archive to its end mark.

    `tarfile` takes a damaged header, or a cut between two members, for the end of the archive. Therefore everything
    after the last member must be zero, and at least one block long.

    Raises:
        ValueError: the archive is damaged.
    """
    with _open(file) as (_, stream), tarfile.open(fileobj=stream, mode="r:") as tar:
        for _ in tar:
            pass
        stream.seek(tar.offset)
        blocks = 0
        while block := stream.read(_BLOCK_BYTES):
            if np.frombuffer(block, np.uint8).any():
                raise ValueError(f"damaged header at byte {tar.offset}")
            blocks += len(block) // tarfile.BLOCKSIZE
    if not blocks:
        raise ValueError("truncated: no end mark")


_READERS: dict[str, Callable[[TextFile, InputOptions], Iterator[Record]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tar": _read_tar,
}
