"""The dataset on disk: WebDataset tar shards, an index beside each, and a manifest over all (docs/format.md).

A folder holds ``manifest.json``, ``train/*.tar`` and ``validation/*.tar``; beside each ``NAME.tar`` lies ``NAME.idx``.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from isal import isal_zlib

from fusiontree import __version__
from fusiontree.data.packing import PACKER_VERSION, Span
from fusiontree.data.remote import Cache, Store, UnreachableError, is_address
from fusiontree.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, require_golden
from fusiontree.errors import RunError, UserError
from fusiontree.files import parse_json, write_atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
INDEX = np.dtype(
    [
        ("tokens", "<u8"),  # absolute offset of the row's tokens in the tar, bytes
        ("ends", "<u8"),  # absolute offset of its segment ends, bytes
        ("segments", "<u4"),  # segment ends of the row
        ("valid", "<u4"),  # tokens that are no padding
        ("crc", "<u4"),  # CRC32 of the token bytes followed by the bytes of the ends
    ]
)
ENDS = np.dtype("<i4")
_LARGEST_HEADER = 1024  # bytes, of an .npy member; ours have 128
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})/[0-9A-Za-z_-]+\.tar")
_INDEX_AGAIN = "restore it, or make it again with `fusiontree data reindex` where the dataset lies"
_Record = TypeVar("_Record")
Buffer: TypeAlias = bytes | memoryview | np.ndarray


@dataclass(frozen=True)
class TokenizerInfo:
    """What the shards, and training on them, must know of a tokenizer."""

    fingerprint: str  # sha256 of tokenizer.json in canonical form
    vocab_size: int  # largest token id + 1
    eos_id: int
    pad_id: int
    golden: dict[str, list[int]] = field(
        default_factory=dict
    )  # the ids of a few texts, see fusiontree/data/tokenizer.py


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 of a folder's tokenizer.json in canonical form.

    Raises:
        UserError: there is none, or it is no JSON.
    """
    try:
        content = parse_json((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer folder {folder} cannot be read ({error}); restore or train it again") from None
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard."""

    name: str  # path of the tar in the dataset folder, with forward slashes
    sha256: str
    bytes: int
    rows: int
    tokens: int  # padding not counted
    documents: int  # that begin in it
    index_sha256: str  # see `index_digest`


@dataclass(frozen=True)
class Manifest:
    """What a dataset says of itself."""

    row_len: int
    dtype: str  # of the tokens: uint16 or uint32
    source: str
    tokenizer: TokenizerInfo
    splits: dict[str, list[ShardInfo]]
    skipped: list[dict[str, Any]] = field(default_factory=list)  # inputs left out: path, reason, count and places
    packer_version: int = PACKER_VERSION
    project_version: str = __version__

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the shards."""
        return self.tokenizer.fingerprint

    def require_tokenizer(self, fingerprint: str, where: Path | str) -> None:
        """Hold a tokenizer folder to the one that made the shards.

        Args:
            fingerprint: its tokenizer's.
            where: the folder; the golden samples are encoded again with what it holds.

        Raises:
            UserError: the fingerprint is another, or a golden sample gets other ids.
        """
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"tokenizer {where} ({fingerprint[:12]}) is not the one that made the shards "
                f"({self.tokenizer.fingerprint[:12]}); give that one, or build the dataset again"
            )
        require_golden(self.tokenizer.golden, where)

    def totals(self, split: str) -> dict[str, int]:
        """Shards, bytes, rows, tokens and documents of a split."""
        shards = self.splits[split]
        names = ("bytes", "rows", "tokens", "documents")
        return {"shards": len(shards)} | {name: sum(getattr(shard, name) for shard in shards) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json."""
        values = {"format": FORMAT_VERSION, **asdict(self)}
        values["totals"] = {split: self.totals(split) for split in self.splits}
        return values

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read FOLDER/manifest.json.

        Raises:
            UserError: there is none, or it is not one that this version reads.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} holds no manifest.json; give a folder that `fusiontree data build` made")
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            version = values.pop("format")
            if version != FORMAT_VERSION:
                raise UserError(f"{path} has format {version}, this version reads {FORMAT_VERSION}; build it again")
            del values["totals"]
            values["tokenizer"] = _record(TokenizerInfo, values["tokenizer"])
            values["splits"] = {
                split: [_record(ShardInfo, shard) for shard in shards] for split, shards in values["splits"].items()
            }
            manifest = _record(cls, values)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a dataset's manifest ({error!r}); build the dataset again") from None
        if manifest.dtype not in ("uint16", "uint32"):
            raise UserError(f"{path}: dtype {manifest.dtype!r} is neither uint16 nor uint32; build the dataset again")
        for split, shards in manifest.splits.items():
            for shard in shards:
                if not _SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(f"{split}/"):
                    raise UserError(f"{path}: {shard.name!r} names no shard in {split}/; build the dataset again")
        return manifest

    def save(self, folder: Path) -> None:
        """Write FOLDER/manifest.json, whole or not at all."""
        write_atomic(folder / MANIFEST, json.dumps(self.to_json(), indent=1) + "\n")


def _record(kind: type[_Record], values: dict[str, Any]) -> _Record:
    """A dataclass from JSON; TypeError if a field is missing, unknown or of another type."""
    record = kind(**values)
    for spec in fields(kind):  # type: ignore[arg-type]
        if type(getattr(record, spec.name)) is not getattr(spec.type, "__origin__", spec.type):
            raise TypeError(f"{spec.name} is not of type {spec.type}")
    return record


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of the format's token types that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def row_crc(tokens: Buffer, ends: Buffer) -> int:
    """CRC32 (zlib's) of a row's token bytes followed by the bytes of its segment ends.

    Args:
        tokens: bytes, or a contiguous little-endian array.
        ends: likewise.
    """
    return isal_zlib.crc32(ends, isal_zlib.crc32(tokens))


class Dataset:
    """One split of a dataset, its packed rows read by number and checked on every read.

    Args:
        location: the dataset's folder, or its address: s3://, gs:// or http(s)://.
        split: train or validation.
        cache: where rows from an address are kept.

    Raises:
        UserError: no dataset there, no such split, a shard is missing or of another size, or an index is not the one
            that the manifest means.
        RunError: the address does not answer.
    """

    def __init__(self, location: Path | str, split: str = "train", cache: Cache | None = None):
        self.location, self.split = str(location), split
        store = Store(self.location, cache or Cache()) if is_address(location) else None
        self.folder = Path(location) if store is None else store.folder  # that of the small files, if at an address
        self.manifest = Manifest.load(self.folder)
        if split not in self.manifest.splits:
            raise UserError(f"{self.location} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        infos = self.manifest.splits[split]
        if store is None:
            self.shards = [Shard(self.folder, info, self.manifest) for info in infos]
        else:
            self.shards = _mirrored(store, self.manifest, infos)
        self._starts = np.cumsum([0] + [len(shard.index) for shard in self.shards])

    @property
    def num_rows(self) -> int:
        """Packed rows."""
        return int(self._starts[-1])

    @property
    def valid_tokens(self) -> np.ndarray:
        """Tokens of each row that are no padding: int64 [num_rows]."""
        counts = [shard.index["valid"].astype(np.int64) for shard in self.shards]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @property
    def fingerprint(self) -> str:
        """Changes when any byte of the split's shards does."""
        return hashlib.sha256("\n".join(shard.info.sha256 for shard in self.shards).encode()).hexdigest()

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [row_len], in the stored dtype, and segment ends, int32 [segments]; both read-only.

        Raises:
            RunError: the row is damaged.
        """
        shard, row = self.place(number)
        return shard.read(row)

    def spans(self, number: int) -> list[Span]:
        """The documents of a row. Reads those of its whole sample: for people, not for training.

        Raises:
            RunError: the sample is damaged.
        """
        shard, row = self.place(number)
        return shard.spans(row)

    def place(self, number: int) -> tuple["Shard", int]:
        """The shard that holds a row, and the row's number in it."""
        if not 0 <= number < self.num_rows:
            raise UserError(
                f"{self.location}: no row {number} in split {self.split}, which has {self.num_rows}, from 0"
            )
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[shard], number - int(self._starts[shard])


class Shard:
    """A shard and its index, open for reading.

    Raises:
        UserError: the tar is missing, or not of the size that the manifest says, or the index is not that of the
            manifest, or not that of the tar.
    """

    def __init__(self, folder: Path, info: ShardInfo, manifest: Manifest):
        self._set_up(folder, info, manifest)
        if not self.path.is_file():
            raise UserError(f"shard {self.path} is missing; restore it or build the dataset again")
        if (size := self.path.stat().st_size) != info.bytes:
            raise UserError(f"shard {self.path} has {size} bytes, not {info.bytes}; restore it or build again")
        self._read_index()
        if len(self.index) and not any(self._ends_fit(row) for row in {0, len(self.index) - 1}):
            raise UserError(
                f"{self.where} is not the shard that {index_path(self.path)} describes (it holds other rows); "
                "restore it or build the dataset again"
            )

    def _set_up(self, folder: Path, info: ShardInfo, manifest: Manifest) -> None:
        self.info, self.path = info, folder / info.name
        self.where = str(self.path)  # for messages
        self.row_len, self.dtype = manifest.row_len, np.dtype(manifest.dtype).newbyteorder("<")

    def _read_index(self) -> None:
        self.index = read_index(self.path)
        if index_digest(self.index) != self.info.index_sha256:
            raise UserError(
                f"{index_path(self.path)} is not the index that the manifest lists for {self.where} (sha256 differs); "
                f"{_INDEX_AGAIN}"
            )

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [row_len] and segment ends, int32 [segments], of a row.

        Raises:
            RunError: the bytes do not match the row's checksum.
        """
        tokens, ends = self._bytes(row)
        if row_crc(tokens, ends) != self.index["crc"][row]:
            raise RunError(
                f"{self.where}: row {row} is damaged (checksum differs); restore the shard or build it again"
            )
        return np.frombuffer(tokens, self.dtype), np.frombuffer(ends, ENDS)

    def _ranges(self, row: int) -> list[tuple[int, int]]:
        """Offset and length, in bytes, of a row's tokens and of its segment ends."""
        entry = self.index[row]
        tokens, ends = self.row_len * self.dtype.itemsize, int(entry["segments"]) * ENDS.itemsize
        return [(int(entry["tokens"]), tokens), (int(entry["ends"]), ends)]

    def _bytes(self, row: int) -> tuple[Buffer, Buffer]:
        """The bytes of a row's tokens and of its segment ends, as far as they are there."""
        # opened for each row: a few microseconds, and no descriptors to bound, to share with forks or to leak
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            (tokens, size), (ends, ends_size) = self._ranges(row)
            return os.pread(descriptor, size, tokens), os.pread(descriptor, ends_size, ends)
        finally:
            os.close(descriptor)

    def _ends_fit(self, row: int) -> bool:
        """Whether what the index takes for a row's segment ends looks like them and holds as many tokens.

        A few hundred bytes are read. Damage to single rows is left to their reading, which can go on without them.
        """
        entry = self.index[row]
        with open(self.path, "rb") as stream:
            stream.seek(int(entry["ends"]))
            content = stream.read(int(entry["segments"]) * ENDS.itemsize)
        ends = np.frombuffer(content[: len(content) // ENDS.itemsize * ENDS.itemsize], ENDS)
        if len(ends) != entry["segments"] or not len(ends) or abs(int(ends[-1])) != self.row_len:
            return False
        return int(np.diff(np.abs(ends), prepend=0)[ends > 0].sum()) == entry["valid"]

    def spans(self, row: int) -> list[Span]:
        """The documents of a row.

        Raises:
            RunError: its sample is damaged.
        """
        offsets = self.index["tokens"].astype(np.int64)
        breaks = np.flatnonzero(np.diff(offsets) != self.row_len * self.dtype.itemsize) + 1
        first = int(np.searchsorted(breaks, row, side="right"))
        first = int(breaks[first - 1]) if first else 0  # the sample's first row: samples do not join seamlessly
        # its ends begin with a header of the tar's and one of NumPy's; its documents lie between them and its tokens
        ends = int(self.index["ends"][first])
        start = max(0, ends - _LARGEST_HEADER - tarfile.BLOCKSIZE)
        try:
            content = self._part(start, int(offsets[first]) - start)
            header = content[: ends - start].rfind(b"\x93NUMPY") - tarfile.BLOCKSIZE
            sample = _read_json(content[max(0, header) :])
            if sample["crc"][row - first] != self.index["crc"][row]:
                raise ValueError("it is another row's")
            return [_record(Span, span) for span in sample["documents"][row - first]]
        except (OSError, LookupError, TypeError, ValueError, tarfile.TarError) as error:
            raise RunError(
                f"{self.where}: the sample of row {row} is damaged ({error}); restore the shard or build it again"
            ) from None

    def _part(self, offset: int, length: int) -> bytes:
        """Bytes of the tar."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)


class RemoteShard(Shard):
    """A shard at an address: its index is mirrored, its rows are fetched one by one.

    Raises:
        UserError: the index does not fit the manifest.
    """

    def __init__(self, store: Store, info: ShardInfo, manifest: Manifest):
        self._set_up(store.folder, info, manifest)
        self.store, self.where = store, f"{store.address}/{info.name}"
        self._read_index()

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """As of a shard on disk; what does not match its checksum is fetched again when it is asked for again.

        Raises:
            RunError: the bytes do not match the row's checksum, or the address does not answer.
        """
        try:
            return super().read(row)
        except UnreachableError:
            raise
        except RunError:
            self.store.forget(self.info.name, row)
            raise

    def _bytes(self, row: int) -> tuple[Buffer, Buffer]:
        ranges = self._ranges(row)
        content = memoryview(self.store.row(self.info.name, row, ranges))
        return content[: ranges[0][1]], content[ranges[0][1] :]

    def _part(self, offset: int, length: int) -> bytes:
        return self.store.part(self.info.name, offset, length)


def _mirrored(store: Store, manifest: Manifest, infos: Sequence[ShardInfo]) -> list[Shard]:
    """Shards at an address, their indexes fetched to this node with the tokenizer that every run needs.

    What this node holds and is not as the manifest says is fetched once more, before anything refuses it: it may have
    been mended at the address. A shard's size is checked before its index is on this node; one that changes later is
    found out row by row.

    Raises:
        UserError: a file is missing, a shard is of another size than the manifest says, or an index does not fit it.
    """
    shards: dict[str, Shard] = {}
    for info in infos:
        with contextlib.suppress(UserError):  # its index is not here, or not as it should be
            shards[info.name] = RemoteShard(store, info, manifest)
    new = [info for info in infos if info.name not in shards]
    indexes = {str(index_path(Path(info.name))): info for info in new}
    tokenizer, config = (f"tokenizer/{name}" for name in (TOKENIZER_FILE, TOKENIZER_CONFIG))

    def sound(name: str) -> bool:
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
        store.files([tokenizer, config, *indexes], sound)
    except OSError as error:
        raise UserError(f"{store.address} lacks files of the dataset ({error}); copy it again") from None
    shards |= {info.name: RemoteShard(store, info, manifest) for info in new}
    return [shards[info.name] for info in infos]


def _read_json(content: bytes) -> dict[str, Any]:
    """The first `.json` member of what begins as a tar.

    Raises:
        ValueError, tarfile.TarError: there is none.
    """
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                stream = tar.extractfile(member)
                found: dict[str, Any] = json.load(stream) if stream else {}
                return found
    raise ValueError("its documents are missing")


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_suffix(".idx")


def index_digest(index: np.ndarray) -> str:
    """sha256 of an index's entries: with it the manifest knows the checksum of every row."""
    return hashlib.sha256(index.tobytes()).hexdigest()


def has_index(folder: Path, info: ShardInfo) -> bool:
    """Whether a dataset folder holds the index that the manifest lists for a shard."""
    try:
        return index_digest(read_index(folder / info.name)) == info.index_sha256
    except UserError:
        return False


def read_index(shard: Path) -> np.ndarray:
    """The stored index of a shard, dtype INDEX [rows].

    Raises:
        UserError: it is missing or no index.
    """
    path = index_path(shard)
    if not path.is_file():
        again = f"`fusiontree data reindex {shard.parent.parent}`"
        raise UserError(f"index {path} is missing; restore it, or make it again with {again}")
    try:
        index, _ = read_array(path.read_bytes(), dimensions=1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no shard's index ({error}); {_INDEX_AGAIN}") from None
    if index.dtype != INDEX:
        raise UserError(f"{path} is no shard's index; {_INDEX_AGAIN}")
    return index


def read_array(content: bytes | memoryview, dimensions: int) -> tuple[np.ndarray, int]:
    """The array of what may be an .npy file, as a view, and the offset of its first element.

    Raises:
        ValueError: whatever is wrong with it.
    """
    head = io.BytesIO(content[:_LARGEST_HEADER])
    try:
        version = np.lib.format.read_magic(head)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(head)
    except Exception as error:  # numpy reads the header as Python's source, and damage has all of Python's errors
        raise ValueError(f"its .npy header is damaged: {' '.join(str(error).split())}") from None
    at, count = head.tell(), math.prod(shape)
    if version != (1, 0) or len(shape) != dimensions or by_columns or dtype.hasobject:
        raise ValueError("an .npy of another kind than it should be")
    if at + count * dtype.itemsize != len(content):
        raise ValueError("an .npy of another size than its header says")
    return np.frombuffer(content, dtype, count, at).reshape(shape), at
