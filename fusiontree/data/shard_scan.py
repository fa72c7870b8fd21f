"""Scan of a shard's bytes, without index or manifest: its rows, and every inconsistency in them.

A damaged tar header hides only its own member: the scan resumes at the next valid header.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data import segments
from fusiontree.data.format import INDEX, ShardInfo, index_digest, read_array, row_crc
from fusiontree.data.segments import ENDS
from fusiontree.errors import short_cause
from fusiontree.files import parse_json

_BLOCK = tarfile.BLOCKSIZE
_MEMBERS = ("ends.npy", "json", "tok.npy")
_TOKEN_TYPES = (np.dtype("<u2"), np.dtype("<u4"))


@dataclass
class ShardScan:
    """The content of a shard, as read from its bytes."""

    bytes: int
    sha256: str
    faults: list[str] = field(default_factory=list)  # one line each; rows are numbered within the shard, from 0
    first_row: int | None = None  # number in the split of the shard's first row, from the first readable key
    row_numbers: list[int] = field(default_factory=list)  # of each readable row, within the shard
    entries: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # INDEX entry of each readable row
    documents: int = 0  # documents that begin in this shard
    max_tokens: list[int] = field(default_factory=list)  # largest token of each readable row
    shapes: set[tuple[int, str]] = field(default_factory=set)  # (row length, token type) found; one if sound
    origins: set[tuple[str, str]] = field(default_factory=set)  # (source, tokenizer fingerprint) found; one if sound

    @property
    def index(self) -> np.ndarray:
        """The index computed from the shard: dtype INDEX [rows]."""
        return np.array(self.entries, dtype=INDEX)

    def out_of_vocabulary(self, vocab_size: int) -> Iterator[str]:
        """Yield one line for each readable row that contains a token id outside the vocabulary."""
        for row, highest in zip(self.row_numbers, self.max_tokens, strict=True):
            if highest >= vocab_size:
                yield f"row {row}: token {highest} is not below the vocabulary size {vocab_size}"

    def info(self, name: str) -> ShardInfo:
        """Return the manifest entry of this shard."""
        tokens = sum(row[3] for row in self.entries)
        digest = index_digest(self.index)
        return ShardInfo(name, self.sha256, self.bytes, len(self.entries), tokens, self.documents, digest)


def scan_shard(path: Path) -> ShardScan:
    """Scan a shard, read into memory in one piece.

    Raises:
        OSError: the file cannot be read.
    """
    content = _read(path)
    scan = ShardScan(len(content), hashlib.sha256(content).hexdigest())
    for key, members in _samples(content, scan.faults):
        scan.first_row = key if scan.first_row is None else scan.first_row
        _add_sample(scan, content, members, key - scan.first_row)
    if scan.first_row is None:
        scan.faults.append("it contains no sample")
    for name, found in (("row lengths or token types", scan.shapes), ("sources or tokenizers", scan.origins)):
        if len(found) > 1:
            scan.faults.append(f"its samples have different {name}")
    return scan


_buffer = bytearray()  # reused for every shard: allocating a new one would cost a third of the time


def _read(path: Path) -> memoryview:
    """Return the content of a file; the view is valid until the next call."""
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
    """Yield (key, {kind: (offset, size)}) for each run of members that share a key."""
    current: int | None = None
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in _walk(content, faults):
        digits, _, kind = name.partition(".")
        if not digits.isdecimal() or kind not in _MEMBERS:
            faults.append(f"member {name!r} does not belong to a packed sample")
            continue
        if current is not None and int(digits) != current:
            yield current, members
            members = {}
        current = int(digits)
        members[kind] = offset, size
    if current is not None:
        yield current, members


def _walk(content: memoryview, faults: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of every member with a valid header; append damage to `faults`."""
    at, damaged_at, end = 0, None, None
    while at < len(content):
        try:
            header = tarfile.TarInfo.frombuf(bytes(content[at : at + _BLOCK]), "utf-8", "surrogateescape")
            if header.size < 0:  # the scan would return to where it was
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError:
            if end is None:  # end of the nonzero bytes, searched only here because the search may read everything
                tail = np.frombuffer(content, np.uint8, offset=at)
                end = len(bytes(content).rstrip(b"\0")) if tail.any() else at
            if at >= end:  # the end-of-archive mark
                break
            damaged_at, at = at if damaged_at is None else damaged_at, at + _BLOCK
            continue
        if damaged_at is not None:
            faults.append(f"tar header at byte {damaged_at} is damaged")
            damaged_at = None
        data = at + _BLOCK
        if data + header.size > len(content):
            faults.append(f"member {header.name!r} is cut short at byte {len(content)}")
            return
        yield header.name, data, header.size
        at = data + -(-header.size // _BLOCK) * _BLOCK
    else:
        if damaged_at is None:
            faults.append("the tar has no end-of-archive mark: it was cut short")
    if damaged_at is not None:
        faults.append(f"tar header at byte {damaged_at} is damaged")


def _add_sample(scan: ShardScan, content: memoryview, members: dict[str, tuple[int, int]], first: int) -> None:
    """Add a sample's rows and faults to the scan; `first` is the number of its first row within the shard."""
    try:
        sample = _Sample.read(content, members)
        documents = [_count_documents(row) for row in sample.documents]
        rows = [sample.row(i) for i in range(len(sample.tokens))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        scan.faults.append(f"the sample that begins at row {first} cannot be read ({short_cause(error)})")
        return
    scan.row_numbers += range(first, first + len(rows))
    scan.entries += [row for row, _ in rows]
    scan.faults += [f"row {first + i}: {fault}" for i, (_, fault) in enumerate(rows) if fault]
    scan.documents += sum(documents)
    scan.max_tokens += sample.tokens.max(axis=1).tolist()
    scan.shapes.add((sample.tokens.shape[1], sample.tokens.dtype.name))
    scan.origins.add((sample.source, sample.tokenizer))


def _count_documents(spans: list[dict[str, Any]]) -> int:
    return sum(span["offset"] == 0 for span in spans)


@dataclass
class _Sample:
    tokens: np.ndarray  # [rows, row_len]
    ends: np.ndarray  # int32 [rows, most segments], padded with 0
    tokens_at: int  # byte offset in the shard
    ends_at: int
    documents: list[list[dict[str, Any]]]  # of each row
    crcs: list[int | None]  # of each row; None: not stored in the sample
    source: str
    tokenizer: str

    @classmethod
    def read(cls, content: memoryview, members: dict[str, tuple[int, int]]) -> "_Sample":
        """Parse the members of a sample.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the members are not a sample.
        """
        if missing := [kind for kind in _MEMBERS if kind not in members]:
            raise ValueError(f"{' and '.join(missing)} missing")
        parts = {kind: content[offset : offset + size] for kind, (offset, size) in members.items()}
        tokens, tokens_at = read_array(parts["tok.npy"], dimensions=2)
        ends, ends_at = read_array(parts["ends.npy"], dimensions=2)
        metadata = parse_json(bytes(parts["json"]))
        documents, rows = metadata["documents"], len(tokens)
        crcs, tokenizer = metadata.get("crc", [None] * rows), metadata.get("tokenizer", "")
        types_fit = tokens.dtype in _TOKEN_TYPES and ends.dtype == ENDS and tokens.shape[1] > 0
        if not types_fit or not rows == len(ends) == len(documents) == len(crcs):
            raise ValueError("its members do not match")
        tokens_at, ends_at = tokens_at + members["tok.npy"][0], ends_at + members["ends.npy"][0]
        return cls(tokens, ends, tokens_at, ends_at, documents, crcs, metadata["source"], tokenizer)

    def row(self, i: int) -> tuple[tuple[int, int, int, int, int], str | None]:
        """Return the index entry of row i, and its fault or None."""
        tokens, ends = self.tokens[i], segments.without_fill(self.ends[i])
        crc, fault = row_crc(tokens, ends), segments.find_fault(ends, len(tokens))
        entry = (
            self.tokens_at + i * tokens.nbytes,
            self.ends_at + i * self.ends[i].nbytes,
            len(ends),
            0 if fault else segments.count_tokens(ends),
            crc,
        )
        if self.crcs[i] not in (None, crc):
            return entry, "checksum differs"
        if fault:
            return entry, fault
        stops = segments.stops(ends)[~segments.is_padding(ends)]
        spans = [span["start"] + span["length"] for span in self.documents[i]]
        return entry, None if spans == stops.tolist() else "its documents do not match its segments"
