"""Documents out of files of every kind. What is broken is told apart from what is sound, and named; nothing raises.

A plain file is damaged a document at a time, so one that is broken costs only itself. Of a compressed file, a tar or a
parquet file that is damaged nothing can be trusted: it is read to its end first, and left out whole.
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
from fusiontree.errors import RunError, UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TOO_SHORT, TOO_LONG = "shorter than --min-chars", "longer than --max-chars"
_PIECE = 1 << 20  # bytes read at a time
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
class Reading:
    """How documents are taken out of files."""

    text_key: str = "text"  # the key, or column, of the text in JSON and parquet
    separator: str | None = None  # ends a document in plain text; None: a file is a document
    min_chars: int = 0  # documents with fewer characters are left out
    max_chars: int | None = None  # documents with more are left out

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("--doc-separator is empty; give the text that ends a document, or leave it out")
        if self.min_chars < 0 or (self.max_chars is not None and self.max_chars < max(1, self.min_chars)):
            raise UserError(
                f"--min-chars {self.min_chars} and --max-chars {self.max_chars} leave nothing; "
                "give 0 <= min <= max and 1 <= max"
            )


@dataclass(frozen=True)
class Record:
    """A document still to be decoded, or the reason why there is none."""

    file: str  # the file's name
    at: str  # what tells it from the file's other documents, as it stands in ids; "" if there are none
    place: str  # the same for people; "" if the record is the file
    content: bytes = b""
    is_json: bool = False
    fault: str = ""  # why it cannot be read; "" if it may be
    read: int = 0  # bytes of the file read when it came out

    @property
    def id(self) -> str:
        """The document's id."""
        return f"{self.file}{self.at}"


class Rejected(Exception):  # noqa: N818 - an outcome, not an error
    """Why a record is no document."""


def require_readers(files: Iterable[TextFile]) -> None:
    """Raise UserError if a file needs a library that is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        for file in files:
            if file.kind == "parquet":
                raise UserError(
                    f"{file.path} needs pyarrow; pip install 'fusiontree[parquet]', or --exclude '*.parquet'"
                )


def is_sealed(file: TextFile) -> bool:
    """Whether damage anywhere spoils the whole file, so that `examine` has to read it."""
    return bool(file.compression) or file.kind in ("parquet", "tar")


def examine(file: TextFile, reading: Reading) -> str:
    """Read a sealed file to its end; returns what is wrong with a file, "" if nothing is."""
    if file.size == 0:
        return "empty"
    try:
        if file.kind == "parquet":
            _examine_parquet(file, reading)
        elif file.kind == "tar":
            _examine_tar(file)
        else:
            with _open(file) as (_, stream):
                while is_sealed(file) and stream.read(_PIECE):
                    pass
    except PermissionError:
        return "no permission to read it"
    except _DAMAGED as error:
        return f"broken {file.compression or file.kind}: {' '.join(str(error).split())}"
    return ""


def records(file: TextFile, reading: Reading, fault: str) -> Iterator[Record]:
    """The records of a file, or one that is its `fault`, as `examine` found it.

    Raises:
        RunError: the file is no longer as it was examined.
    """
    if fault:
        return iter([Record(file.name, "", "", fault=fault, read=file.size)])
    return _unchanged(file, _READERS[file.kind](file, reading))


def _unchanged(file: TextFile, found: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from found
    except _DAMAGED as error:
        raise RunError(f"{file.path} changed while it was being read ({error}); run again") from None


def text_of(record: Record, reading: Reading) -> str:
    """The text of a record.

    Raises:
        Rejected: there is none, or it is not of the length asked for.
    """
    if record.fault:
        raise Rejected(record.fault)
    try:
        text = record.content.decode()
    except UnicodeDecodeError as error:
        line = record.content.count(b"\n", 0, error.start) + 1
        raise Rejected("not UTF-8" if record.place else f"not UTF-8 (line {line}, byte {error.start})") from None
    text = text.removeprefix("\ufeff")  # the byte order mark of some editors, which is no part of the text
    if record.is_json:
        text = _json_text(text, reading.text_key)
    if not text:
        raise Rejected("empty")
    if len(text) < reading.min_chars:
        raise Rejected(TOO_SHORT)
    if reading.max_chars is not None and len(text) > reading.max_chars:
        raise Rejected(TOO_LONG)
    return text


def _json_text(line: str, key: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise Rejected("not valid JSON") from None
    if not isinstance(values, dict):
        raise Rejected("no JSON object")
    if key not in values:
        raise Rejected(f"no key {key!r} (its keys: {', '.join(sorted(values)[:6])})")
    text = values[key]
    if not isinstance(text, str):
        raise Rejected(f"{key!r} is no text")
    try:
        if not text.isascii():  # which is known without a look at it
            text.encode()
    except UnicodeEncodeError:  # an escape such as \ud800 alone
        raise Rejected("half a surrogate pair") from None
    return text


# --- kinds -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(file: TextFile) -> Iterator[tuple[BinaryIO, Any]]:
    """The file as it lies on the disk, whose position is the progress, and the stream of what it holds."""
    with open(file.path, "rb", buffering=_PIECE) as raw:
        if file.compression:
            with _DECOMPRESS[file.compression](raw) as stream:
                yield raw, stream
        else:
            yield raw, raw


def _read_jsonl(file: TextFile, _: Reading) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield Record(file.name, f":{number}", f"line {number}", line, is_json=True, read=raw.tell())


def _read_text(file: TextFile, reading: Reading) -> Iterator[Record]:
    with _open(file) as (raw, stream):
        if reading.separator is None:
            yield Record(file.name, "", "", stream.read(), read=file.size)
            return
        line = 1
        separator = reading.separator.encode()
        for number, content in enumerate(_split(stream, separator), 1):
            if content and not content.isspace():
                yield Record(file.name, f":{number}", f"document {number}, line {line}", content, read=raw.tell())
            line += (content + separator).count(b"\n")


def _split(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """What lies between the separators; a piece of the file at a time, so that it may be larger than memory."""
    rest = b""
    while piece := stream.read(max(_PIECE, len(rest))):  # as much again, or a long document would be searched for ever
        *whole, rest = (rest + piece).split(separator)
        yield from whole
    yield rest


def _read_parquet(file: TextFile, reading: Reading) -> Iterator[Record]:
    for number, (text, read) in enumerate(_parquet_column(file, reading.text_key)):
        fault = "" if text is not None else "null"
        yield Record(file.name, f":{number}", f"row {number}", (text or "").encode(), fault=fault, read=read)


def _parquet_column(file: TextFile, name: str) -> Iterator[tuple[str | None, int]]:
    """The texts of a column and, with each, its share of the file in bytes."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
        done, rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=256, columns=[name], use_threads=False):
            done += len(batch)
            for text in batch.column(0).to_pylist():
                yield text, file.size * done // rows


def _examine_parquet(file: TextFile, reading: Reading) -> None:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if reading.text_key not in names:
            raise ValueError(f"no column {reading.text_key!r} (its columns: {', '.join(names[:6])})")
        kind = table.schema_arrow.field(reading.text_key).type
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(values) or pyarrow.types.is_large_string(values)):
            raise ValueError(f"column {reading.text_key!r} is no text but {kind}")
    for _ in _parquet_column(file, reading.text_key):
        pass


def _read_tar(file: TextFile, _: Reading) -> Iterator[Record]:
    """One document per sample: its `.txt`, or else the text in its `.json`."""
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
            yield Record(file.name, f"/{key}", f"member {chosen.name}", text, is_json, read=raw.tell())


def _sample_key(member: tarfile.TarInfo) -> str:
    """The part of a member's name that WebDataset groups by: up to the first dot of its last part."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _examine_tar(file: TextFile) -> None:
    """Beyond what `tarfile` sees: an archive cut between two members, or one whose header is damaged further on."""
    with _open(file) as (_, stream), tarfile.open(fileobj=stream, mode="r:") as tar:
        for _ in tar:
            pass
        stream.seek(tar.offset)
        blocks = 0
        while piece := stream.read(_PIECE):
            if np.frombuffer(piece, np.uint8).any():
                raise ValueError(f"damaged header at byte {tar.offset}")
            blocks += len(piece) // tarfile.BLOCKSIZE
    if not blocks:
        raise ValueError("ends without its end mark, so it is cut short")


_READERS: dict[str, Callable[[TextFile, Reading], Iterator[Record]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tar": _read_tar,
}
