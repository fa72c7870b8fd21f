"""What the bytes of a shard say by themselves, without index or manifest, and everything in them that cannot be right.

A damaged header hides only its own member: the walk goes on at the next header that is sound.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.format import ENDS, INDEX, ShardInfo, index_digest, read_array, row_crc
from fusiontree.files import parse_json

_BLOCK = tarfile.BLOCKSIZE
_MEMBERS = ("ends.npy", "json", "tok.npy")
_TOKENS = (np.dtype("<u2"), np.dtype("<u4"))


@dataclass
class ShardScan:
    """A shard as it is."""

    bytes: int
    sha256: str
    faults: list[str] = field(default_factory=list)  # a line each, naming rows of the shard, from 0
    first_row: int | None = None  # the number in its split of the first row, as the first readable member says
    row_numbers: list[int] = field(default_factory=list)  # of the readable rows, counted from the shard's first
    entries: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # the same as INDEX has them
    documents: int = 0  # that begin in it
    max_tokens: list[int] = field(default_factory=list)  # largest token of each readable row
    shapes: set[tuple[int, str]] = field(default_factory=set)  # (row length, token type) found; one if sound
    origins: set[tuple[str, str]] = field(default_factory=set)  # (source, tokenizer fingerprint) found; one if sound

    @property
    def index(self) -> np.ndarray:
        """The index that the shard calls for: dtype INDEX [rows]."""
        return np.array(self.entries, dtype=INDEX)

    def out_of_vocabulary(self, vocab_size: int) -> Iterator[str]:
        """A line for each readable row with a token that no vocabulary of that size has."""
        for row, highest in zip(self.row_numbers, self.max_tokens, strict=True):
            if highest >= vocab_size:
                yield f"row {row}: token {highest} is not below the vocabulary size {vocab_size}"

    def info(self, name: str) -> ShardInfo:
        """What a manifest says of this shard."""
        tokens = sum(row[3] for row in self.entries)
        digest = index_digest(self.index)
        return ShardInfo(name, self.sha256, self.bytes, len(self.entries), tokens, self.documents, digest)


def scan_shard(path: Path) -> ShardScan:
    """Read a whole shard, once; it is held in memory meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    content = _read(path)
    scan = ShardScan(len(content), hashlib.sha256(content).hexdigest())
    for key, members in _samples(content, scan.faults):
        scan.first_row = key if scan.first_row is None else scan.first_row
        _take_sample(scan, content, members, key - scan.first_row)
    if scan.first_row is None:
        scan.faults.append("it holds no sample")
    for name, found in (("row lengths or token types", scan.shapes), ("sources or tokenizers", scan.origins)):
        if len(found) > 1:
            scan.faults.append(f"its samples have different {name}")
    return scan


_buffer = bytearray()  # kept from one shard to the next: fresh memory for each would cost a third of the time


def _read(path: Path) -> memoryview:
    """The content of a file, until the next call."""
    global _buffer
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if len(_buffer) < size:
            _buffer = bytearray(size)
        view = memoryview(_buffer)
        read = 0
        while read < size and (count := stream.readinto(view[read:size])):
            read += count
    return view[:read].toreadonly()


def _samples(content: memoryview, faults: list[str]) -> Iterator[tuple[int, dict[str, tuple[int, int]]]]:
    """(key, place of each member as offset and size) of consecutive members that share a key."""
    current: int | None = None
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in _walk(content, faults):
        digits, _, kind = name.partition(".")
        if not digits.isdecimal() or kind not in _MEMBERS:
            faults.append(f"member {name!r} is none of a packed sample's")
            continue
        if current is not None and int(digits) != current:
            yield current, members
            members = {}
        current = int(digits)
        members[kind] = offset, size
    if current is not None:
        yield current, members


def _walk(content: memoryview, faults: list[str]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every member whose header is sound; the rest goes to `faults`."""
    at, lost, end = 0, None, None
    while at < len(content):
        try:
            header = tarfile.TarInfo.frombuf(bytes(content[at : at + _BLOCK]), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if end is None:  # of what is not zero, whose search reads everything if it has to
                tail = np.frombuffer(content, np.uint8, offset=at)
                end = len(bytes(content).rstrip(b"\0")) if tail.any() else at
            if at >= end:  # the end mark
                break
            lost, at = at if lost is None else lost, at + _BLOCK
            continue
        if lost is not None:
            faults.append(f"tar header at byte {lost} is damaged")
            lost = None
        data = at + _BLOCK
        if data + header.size > len(content):
            faults.append(f"member {header.name!r} is cut short at byte {len(content)}")
            return
        yield header.name, data, header.size
        at = data + -(-header.size // _BLOCK) * _BLOCK
    else:
        if lost is None:
            faults.append("the tar has no end mark: it was cut short")
    if lost is not None:
        faults.append(f"tar header at byte {lost} is damaged")


def _take_sample(scan: ShardScan, content: memoryview, members: dict[str, tuple[int, int]], first: int) -> None:
    """Add a sample's rows to the scan; what is wrong with it is named by the rows of the shard, from `first`."""
    try:
        sample = _Sample.read(content, members)
        documents = [_documents(row) for row in sample.documents]
        rows = [sample.row(i) for i in range(len(sample.tokens))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        scan.faults.append(f"row {first} and its sample cannot be read ({error})")
        return
    scan.row_numbers += range(first, first + len(rows))
    scan.entries += [row for row, _ in rows]
    scan.faults += [f"row {first + i}: {fault}" for i, (_, fault) in enumerate(rows) if fault]
    scan.documents += sum(documents)
    scan.max_tokens += sample.tokens.max(axis=1).tolist()
    scan.shapes.add((sample.tokens.shape[1], sample.tokens.dtype.name))
    scan.origins.add((sample.source, sample.tokenizer))


def _documents(spans: list[dict[str, Any]]) -> int:
    return sum(span["offset"] == 0 for span in spans)


@dataclass
class _Sample:
    tokens: np.ndarray  # [rows, row_len]
    ends: np.ndarray  # int32 [rows, most segments], filled up with 0
    tokens_at: int  # bytes into the shard
    ends_at: int
    documents: list[list[dict[str, Any]]]  # by row
    crcs: list[int | None]  # by row; None: the sample keeps none
    source: str
    tokenizer: str

    @classmethod
    def read(cls, content: memoryview, members: dict[str, tuple[int, int]]) -> "_Sample":
        """ValueError and its like if the members are no sample."""
        if missing := [kind for kind in _MEMBERS if kind not in members]:
            raise ValueError(f"{' and '.join(missing)} missing")
        parts = {kind: content[offset : offset + size] for kind, (offset, size) in members.items()}
        tokens, tokens_at = read_array(parts["tok.npy"], dimensions=2)
        ends, ends_at = read_array(parts["ends.npy"], dimensions=2)
        about = parse_json(bytes(parts["json"]))
        documents, rows = about["documents"], len(tokens)
        crcs = about.get("crc", [None] * rows)
        if tokens.dtype not in _TOKENS or ends.dtype != ENDS or not rows == len(ends) == len(documents) == len(crcs):
            raise ValueError("its members do not fit together")
        tokens_at, ends_at = tokens_at + members["tok.npy"][0], ends_at + members["ends.npy"][0]
        return cls(tokens, ends, tokens_at, ends_at, documents, crcs, about["source"], about.get("tokenizer", ""))

    def row(self, i: int) -> tuple[tuple[int, int, int, int, int], str | None]:
        """The index entry that row i calls for, and what is wrong with the row."""
        tokens, ends = self.tokens[i], self.ends[i]
        ends = ends[: np.count_nonzero(ends)]
        bounds = np.abs(ends)
        lengths = bounds.copy()
        lengths[1:] -= bounds[:-1]  # np.diff would cost as much as the checksum
        real = ends > 0
        crc, row_len = row_crc(tokens, ends), len(tokens)
        entry = (
            self.tokens_at + i * tokens.nbytes,
            self.ends_at + i * self.ends[i].nbytes,
            len(ends),
            int(lengths[real].sum()),
            crc,
        )
        if self.crcs[i] not in (None, crc):
            return entry, "checksum differs"
        if not len(ends) or (lengths <= 0).any() or bounds[-1] != row_len:
            return entry, f"segment ends do not ascend to the row's length {row_len}"
        spans = [span["start"] + span["length"] for span in self.documents[i]]
        return entry, None if spans == bounds[real].tolist() else "its documents are not its segments"
