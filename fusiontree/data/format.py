"""The dataset on disk: WebDataset tar shards, one index per shard, one manifest (docs/format.md).

A folder contains ``manifest.json``, ``train/*.tar`` and ``validation/*.tar``; each ``NAME.tar`` has ``NAME.idx``.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from isal import isal_zlib

from fusiontree import __version__
from fusiontree.data import segments
from fusiontree.data.invariants import find_index_fault, find_manifest_fault, find_row_fault
from fusiontree.data.packing import PACKER_VERSION, Span
from fusiontree.data.remote import Cache, Store, UnreachableError
from fusiontree.data.segments import ENDS
from fusiontree.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, require_golden
from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.files import parse_json, write_atomic
from fusiontree.paths import is_address

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = np.dtype(
    [
        ("tokens", "<u8"),  # absolute offset of the row's tokens in the tar, bytes
        ("ends", "<u8"),  # absolute offset of its segment ends, bytes
        ("segments", "<u4"),  # number of segment ends
        ("valid", "<u4"),  # tokens that are not padding
        ("crc", "<u4"),  # CRC32 of the token bytes followed by the bytes of the ends
    ]
)
_LARGEST_HEADER = 1024  # bytes; upper bound of an .npy header (`writer.py` writes 128)
_INDEX_REMEDY = "restore it, or rebuild it with `fusiontree data reindex` where the dataset is stored"
_Record = TypeVar("_Record")
Buffer: TypeAlias = bytes | memoryview | np.ndarray


@dataclass(frozen=True)
class TokenizerInfo:
    """The properties of a tokenizer that shards and training depend on."""

    fingerprint: str  # sha256 of tokenizer.json in canonical form
    vocab_size: int  # largest token id + 1
    eos_id: int
    pad_id: int
    golden: dict[str, list[int]] = field(default_factory=dict)  # token ids of the golden texts, see tokenizer.py


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 of a folder's tokenizer.json in canonical form.

    Raises:
        UserError: tokenizer.json is missing or not valid JSON.
    """
    try:
        content = parse_json((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer folder {folder} cannot be read ({short_cause(error)}); restore or retrain it"
        ) from None
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class ShardInfo:
    """The manifest entry of a shard."""

    name: str  # path of the tar within the dataset folder, with forward slashes
    sha256: str
    bytes: int
    rows: int
    tokens: int  # without padding
    documents: int  # documents that begin in this shard
    index_sha256: str  # see `index_digest`


@dataclass(frozen=True)
class Manifest:
    """The description of a dataset: its format, tokenizer and shards."""

    row_len: int
    dtype: str  # token type: uint16 or uint32
    source: str
    tokenizer: TokenizerInfo
    splits: dict[str, list[ShardInfo]]
    skipped: list[dict[str, Any]] = field(default_factory=list)  # skipped inputs: path, reason, count and places
    packer_version: int = PACKER_VERSION
    project_version: str = __version__

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer that made the shards."""
        return self.tokenizer.fingerprint

    def require_tokenizer(self, fingerprint: str, where: Path | str) -> None:
        """Check that a tokenizer is the one that made the shards.

        Args:
            fingerprint: fingerprint of the tokenizer to check.
            where: its folder, used to encode the golden texts again.

        Raises:
            UserError: the fingerprint differs, or a golden text gets different ids.
        """
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"tokenizer {where} ({fingerprint[:12]}) is not the one that made the shards "
                f"({self.tokenizer.fingerprint[:12]}); use that tokenizer, or rebuild the dataset"
            )
        require_golden(self.tokenizer.golden, where)

    def totals(self, split: str) -> dict[str, int]:
        """Return the numbers of shards, bytes, rows, tokens and documents of a split."""
        shards = self.splits[split]
        names = ("bytes", "rows", "tokens", "documents")
        return {"shards": len(shards)} | {name: sum(getattr(shard, name) for shard in shards) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return the content of manifest.json."""
        values = {"format": FORMAT_VERSION, **asdict(self)}
        values["totals"] = {split: self.totals(split) for split in self.splits}
        return values

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read FOLDER/manifest.json.

        Raises:
            UserError: the manifest is missing, invalid or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} has no manifest.json; give a folder made by `fusiontree data build`")
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            version = values.pop("format")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version!r:.60}, but this version reads {FORMAT_VERSION}; rebuild the dataset"
                )
            del values["totals"]
            values["tokenizer"] = _record(TokenizerInfo, values["tokenizer"])
            values["splits"] = {
                split: [_record(ShardInfo, shard) for shard in shards] for split, shards in values["splits"].items()
            }
            manifest = _record(cls, values)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a dataset's manifest ({short_cause(error)}); rebuild the dataset") from None
        if fault := find_manifest_fault(manifest):
            raise UserError(f"{path}: {fault}; rebuild the dataset")
        return manifest

    def save(self, folder: Path) -> None:
        """Write FOLDER/manifest.json atomically."""
        write_atomic(folder / MANIFEST, json.dumps(self.to_json(), indent=1) + "\n")


def _record(kind: type[_Record], values: dict[str, Any]) -> _Record:
    """Build a dataclass from JSON values.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type.
        TypeError: `values` is not a mapping.
    """
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]
    required = {name for name, spec in specs.items() if spec.default is MISSING and spec.default_factory is MISSING}
    for problem, names in (("lacks", required - {*values}), ("has an unknown", {*values} - {*specs})):
        if names:
            raise ValueError(f"it {problem} {min(names)}")
    record = kind(**values)
    for name, spec in specs.items():
        if type(getattr(record, name)) is not getattr(spec.type, "__origin__", spec.type):
            raise ValueError(f"{name} is not of type {spec.type}")
    return record


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the format's narrowest token type for ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def row_crc(tokens: Buffer, ends: Buffer) -> int:
    """Return the CRC32 (zlib's) of a row's token bytes followed by the bytes of its segment ends.

    Args:
        tokens: bytes, or a contiguous little-endian array.
        ends: likewise.
    """
    return isal_zlib.crc32(ends, isal_zlib.crc32(tokens))


class DamagedRowError(RunError):
    """A stored row that fails its checksum or is not a row; `fault` is the reason without the place."""

    def __init__(self, where: str, row: int, fault: str):
        super().__init__(f"{where}: row {row} {fault}; restore the shard or rebuild the dataset")
        self.fault = fault


class Dataset:
    """One split of a dataset; packed rows are read by number and verified on every read.

    Args:
        location: the dataset's folder, or its address: s3://, gs:// or http(s)://.
        split: train or validation.
        cache: cache of the rows read from an address.

    Raises:
        UserError: there is no dataset or no such split, a shard is missing or has another size, or an index does not
            match the manifest.
        RunError: the address does not respond.
    """

    def __init__(self, location: Path | str, split: str = "train", cache: Cache | None = None):
        self.location, self.split = str(location), split
        store = Store(self.location, cache or Cache()) if is_address(location) else None
        self.folder = Path(location) if store is None else store.folder  # of an address: its mirrored small files
        self.manifest = Manifest.load(self.folder)
        if split not in self.manifest.splits:
            raise UserError(f"{self.location} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        infos = self.manifest.splits[split]
        if store is None:
            self.shards = [Shard(self.folder, info, self.manifest) for info in infos]
        else:
            self.shards = _open_mirrored(store, self.manifest, infos)
        self._starts = np.cumsum([0] + [len(shard.index) for shard in self.shards])

    @property
    def num_rows(self) -> int:
        """Number of packed rows."""
        return int(self._starts[-1])

    @property
    def valid_tokens(self) -> np.ndarray:
        """Tokens per row without padding: int64 [num_rows]."""
        counts = [shard.index["valid"].astype(np.int64) for shard in self.shards]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @property
    def fingerprint(self) -> str:
        """Digest of the split: it changes with any byte of its shards."""
        return hashlib.sha256("\n".join(shard.info.sha256 for shard in self.shards).encode()).hexdigest()

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's tokens [row_len], in the stored dtype, and segment ends, int32 [segments]; both read-only.

        Raises:
            RunError: the row is damaged.
        """
        shard, row = self.place(number)
        return shard.read(row)

    def spans(self, number: int) -> list[Span]:
        """Return the documents of a row, for inspection: this reads the document lists of up to 32 rows.

        Raises:
            RunError: the row's sample is damaged.
        """
        shard, row = self.place(number)
        return shard.spans(row)

    def place(self, number: int) -> tuple["Shard", int]:
        """Return the shard that contains a row, and the row's number within that shard.

        Raises:
            UserError: the split has no such row.
        """
        if not 0 <= number < self.num_rows:
            raise UserError(
                f"{self.location}: no row {number} in split {self.split}; its {self.num_rows} rows are numbered from 0"
            )
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[shard], number - int(self._starts[shard])


class Shard:
    """A shard and its index, open for reading.

    Raises:
        UserError: the tar is missing, its size differs from the manifest's, or the index does not match the manifest
            or the tar.
    """

    def __init__(self, folder: Path, info: ShardInfo, manifest: Manifest):
        self._set_up(folder, info, manifest)
        if not self.path.is_file():
            raise UserError(f"shard {self.path} is missing; restore it or rebuild the dataset")
        if (size := self.path.stat().st_size) != info.bytes:
            raise UserError(f"shard {self.path} has {size} bytes, not {info.bytes}; restore it or rebuild the dataset")
        self._read_index()
        if len(self.index) and not any(self._index_fits(row) for row in {0, len(self.index) - 1}):
            raise UserError(
                f"{self.where} is not the shard that {index_path(self.path)} describes (it contains other rows); "
                "restore it or rebuild the dataset"
            )

    def _set_up(self, folder: Path, info: ShardInfo, manifest: Manifest) -> None:
        self.info, self.path = info, folder / info.name
        self.where = str(self.path)  # for messages
        self.row_len, self.dtype = manifest.row_len, np.dtype(manifest.dtype).newbyteorder("<")
        self.vocab_size = manifest.vocab_size

    def _read_index(self) -> None:
        self.index = read_index(self.path)
        if index_digest(self.index) != self.info.index_sha256:
            raise UserError(
                f"{index_path(self.path)} is not the index that the manifest lists for {self.where} (sha256 differs); "
                f"{_INDEX_REMEDY}"
            )
        if fault := find_index_fault(self.index, self.info, self.row_len, self.dtype.itemsize):
            raise UserError(f"{index_path(self.path)} is no index of {self.where}: {fault}; rebuild the dataset")

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's tokens [row_len] and segment ends, int32 [segments].

        Raises:
            DamagedRowError: the bytes do not match the row's checksum, or are not a row of this dataset.
        """
        token_bytes, end_bytes = self._read_bytes(row)
        entry = self.index[row]
        if row_crc(token_bytes, end_bytes) != entry["crc"]:
            raise DamagedRowError(self.where, row, "is damaged (checksum differs)")
        tokens, ends = np.frombuffer(token_bytes, self.dtype), np.frombuffer(end_bytes, ENDS)
        if fault := find_row_fault(tokens, ends, int(entry["valid"]), self.vocab_size):
            raise DamagedRowError(self.where, row, f"is damaged ({fault})")
        return tokens, ends

    def _ranges(self, row: int) -> list[tuple[int, int]]:
        """Return offset and length, in bytes, of a row's tokens and of its segment ends."""
        entry = self.index[row]
        tokens, ends = self.row_len * self.dtype.itemsize, int(entry["segments"]) * ENDS.itemsize
        return [(int(entry["tokens"]), tokens), (int(entry["ends"]), ends)]

    def _read_bytes(self, row: int) -> tuple[Buffer, Buffer]:
        """Read the bytes of a row's tokens and of its segment ends; fewer if the file ends early."""
        # opened per row: this costs microseconds, and leaves no descriptors to limit, to leak or to share with forks
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            (tokens, size), (ends, ends_size) = self._ranges(row)
            return os.pread(descriptor, size, tokens), os.pread(descriptor, ends_size, ends)
        finally:
            os.close(descriptor)

    def _index_fits(self, row: int) -> bool:
        """Check that the shard has plausible segment ends where the index expects those of `row`.

        This reads a few hundred bytes. Damage to single rows is left to `read`: training continues without them.
        """
        entry = self.index[row]
        with open(self.path, "rb") as stream:
            stream.seek(int(entry["ends"]))
            content = stream.read(int(entry["segments"]) * ENDS.itemsize)
        ends = np.frombuffer(content[: len(content) // ENDS.itemsize * ENDS.itemsize], ENDS)
        return (
            len(ends) == entry["segments"]
            and not segments.find_fault(ends, self.row_len)
            and segments.count_tokens(ends) == entry["valid"]
        )

    def spans(self, row: int) -> list[Span]:
        """Return the documents of a row.

        Raises:
            RunError: the row's sample is damaged.
        """
        offsets = self.index["tokens"].astype(np.int64)
        breaks = np.flatnonzero(np.diff(offsets) != self.row_len * self.dtype.itemsize) + 1
        first = int(np.searchsorted(breaks, row, side="right"))
        first = int(breaks[first - 1]) if first else 0  # the sample's first row: tokens are contiguous within a sample
        # a sample begins with the tar header and the .npy header of its ends; its documents precede its tokens
        ends = int(self.index["ends"][first])
        start = max(0, ends - _LARGEST_HEADER - tarfile.BLOCKSIZE)
        try:
            content = self._read_range(start, int(offsets[first]) - start)
            header = content[: ends - start].rfind(b"\x93NUMPY") - tarfile.BLOCKSIZE
            sample = _read_json(content[max(0, header) :])
            if sample["crc"][row - first] != self.index["crc"][row]:
                raise ValueError("its checksum differs from the index")
            spans = [_record(Span, span) for span in sample["documents"][row - first]]
            if any(s.start < 0 or s.length < 1 or s.start + s.length > self.row_len or s.offset < 0 for s in spans):
                raise ValueError("its documents are outside the row")
            return spans
        except (OSError, LookupError, TypeError, ValueError, tarfile.TarError) as error:
            raise RunError(
                f"{self.where}: the sample of row {row} is damaged ({short_cause(error)}); restore the shard or "
                "rebuild the dataset"
            ) from None

    def _read_range(self, offset: int, length: int) -> bytes:
        """Read a byte range of the tar."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)


class RemoteShard(Shard):
    """A shard at an address; its index is mirrored, its rows are fetched one by one.

    Raises:
        UserError: the index does not match the manifest.
    """

    def __init__(self, store: Store, info: ShardInfo, manifest: Manifest):
        self._set_up(store.folder, info, manifest)
        self.store, self.where = store, f"{store.address}/{info.name}"
        self._read_index()

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a row as `Shard.read` does; drop it from the cache if its checksum differs, so that a retry fetches it.

        Raises:
            RunError: the bytes do not match the row's checksum, or the address does not respond.
        """
        try:
            return super().read(row)
        except UnreachableError:
            raise
        except RunError:
            self.store.drop_row(self.info.name, row)
            raise

    def _read_bytes(self, row: int) -> tuple[Buffer, Buffer]:
        ranges = self._ranges(row)
        content = memoryview(self.store.row(self.info.name, row, ranges))
        return content[: ranges[0][1]], content[ranges[0][1] :]

    def _read_range(self, offset: int, length: int) -> bytes:
        return self.store.read_range(self.info.name, offset, length)


def _open_mirrored(store: Store, manifest: Manifest, infos: Sequence[ShardInfo]) -> list[Shard]:
    """Open the shards at an address; mirror their indexes and the tokenizer on this node.

    A mirrored file that does not match the manifest is fetched again before it is refused, because it may have been
    repaired at the address. A shard's size is checked whenever its index is fetched. A shard that changes later is
    detected row by row.

    Raises:
        UserError: a file is missing, a shard's size differs from the manifest's, or an index does not match it.
    """
    shards: dict[str, Shard] = {}
    for info in infos:
        with contextlib.suppress(UserError):  # its index is not mirrored yet, or does not match
            shards[info.name] = RemoteShard(store, info, manifest)
    new = [info for info in infos if info.name not in shards]
    indexes = {str(index_path(Path(info.name))): info for info in new}
    tokenizer, config = (f"tokenizer/{name}" for name in (TOKENIZER_FILE, TOKENIZER_CONFIG))

    def is_valid(name: str) -> bool:
        if name in indexes:
            return has_index(store.folder, indexes[name])
        try:
            if name == tokenizer:
                return tokenizer_fingerprint(store.folder / "tokenizer") == manifest.tokenizer_fingerprint
            return isinstance(parse_json((store.folder / config).read_bytes()), dict)
        except (OSError, UserError, ValueError):
            return False

    try:
        for info, size in zip(new, store.sizes([info.name for info in new]), strict=True):
            if size not in (None, info.bytes):
                raise UserError(f"shard {store.address}/{info.name} has {size} bytes, not {info.bytes}; copy it again")
        store.mirror([tokenizer, config, *indexes], is_valid)
    except OSError as error:
        raise UserError(
            f"{store.address} lacks files of the dataset ({short_cause(error)}); copy the dataset again"
        ) from None
    shards |= {info.name: RemoteShard(store, info, manifest) for info in new}
    return [shards[info.name] for info in infos]


def _read_json(content: bytes) -> dict[str, Any]:
    """Return the content of the first `.json` member of a tar, which may be cut off after that member.

    Raises:
        ValueError, tarfile.TarError: there is no such member.
    """
    at = 0
    while at < len(content):
        header = tarfile.TarInfo.frombuf(content[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        at += tarfile.BLOCKSIZE
        if header.size < 0:  # the scan would return to where it was
            raise ValueError("negative size")
        if header.name.endswith(".json"):
            found: dict[str, Any] = parse_json(content[at : at + header.size])
            return found
        at += header.size + -header.size % tarfile.BLOCKSIZE
    raise ValueError("its documents are missing")


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index."""
    return shard.with_suffix(".idx")


def index_digest(index: np.ndarray) -> str:
    """Return the sha256 of an index's entries; through it the manifest covers the checksum of every row."""
    return hashlib.sha256(index.tobytes()).hexdigest()


def has_index(folder: Path, info: ShardInfo) -> bool:
    """Return whether a dataset folder contains the index that the manifest lists for a shard."""
    try:
        return index_digest(read_index(folder / info.name)) == info.index_sha256
    except UserError:
        return False


def read_index(shard: Path) -> np.ndarray:
    """Read the stored index of a shard, dtype INDEX [rows].

    Raises:
        UserError: it is missing or not an index.
    """
    path = index_path(shard)
    if not path.is_file():
        command = f"`fusiontree data reindex {shard.parent.parent}`"
        raise UserError(f"index {path} is missing; restore it, or rebuild it with {command}")
    try:
        index, _ = read_array(path.read_bytes(), dimensions=1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a shard index ({short_cause(error)}); {_INDEX_REMEDY}") from None
    if index.dtype != INDEX:
        raise UserError(f"{path} is not a shard index; {_INDEX_REMEDY}")
    return index


def read_array(content: bytes | memoryview, dimensions: int) -> tuple[np.ndarray, int]:
    """Parse an .npy file; return its array as a view of `content`, and the offset of the first element.

    Raises:
        ValueError: `content` is not an .npy file with this number of dimensions.
    """
    head = io.BytesIO(content[:_LARGEST_HEADER])
    try:
        version = np.lib.format.read_magic(head)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(head)
    except Exception as error:  # NumPy parses the header as Python source, so damage can raise any exception
        raise ValueError(f"its .npy header is damaged: {short_cause(error)}") from None
    at, count = head.tell(), math.prod(shape)
    if version != (1, 0) or len(shape) != dimensions or by_columns or dtype.hasobject:
        raise ValueError("its .npy header has an unexpected version, shape, order or type")
    if at + count * dtype.itemsize != len(content):
        raise ValueError("its size differs from its .npy header's")
    return np.frombuffer(content, dtype, count, at).reshape(shape), at
