"""Collation of rows into batches. Axes: B rows, L tokens. A segment is a document, a piece of one, or padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from fusiontree.data import segments

IGNORE = -100  # label without loss


@dataclass(frozen=True)
class BadRow:
    """A stored row that could not be read or failed its checksum; training uses a masked row instead."""

    source: str
    shard: str  # name within the dataset
    row: int  # within the shard
    location: str = field(compare=False)  # the shard's path or address; a dataset that was moved has the same rows
    reason: str = field(compare=False)

    @property
    def split(self) -> str:
        """The split that the row is from."""
        return self.shard.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.location}: row {self.row} {self.reason}"


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, with the bounds that keep their documents apart."""

    input_ids: np.ndarray  # int64 [B, L]
    labels: np.ndarray  # int64 [B, L], the next token of the segment; IGNORE at its last token and on padding
    position_ids: np.ndarray  # int64 [B, L], from 0 at each segment's start
    seq_idx: np.ndarray  # int32 [B, L], index of the segment within its row, from 0, nondecreasing along the row
    cu_seqlens: np.ndarray  # int32 [segments + 1], bounds of all segments over the flattened B·L tokens
    max_seqlen: int  # tokens of the longest segment
    damaged: tuple[BadRow, ...] = ()  # stored rows that are replaced by masked rows
    sources: tuple[int, ...] = ()  # each row's index among the run's datasets; further rows only fill the batch

    @property
    def real_tokens(self) -> int:
        """Number of tokens whose label carries loss."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return np.diff(self.cu_seqlens).tolist()


def collate(
    tokens: np.ndarray,
    ends: Sequence[np.ndarray],
    damaged: tuple[BadRow, ...] = (),
    sources: tuple[int, ...] = (),
) -> Batch:
    """Build a batch.

    Args:
        tokens: any integer dtype [B, L].
        ends: for each row int32 [segments], see `segments`; the last is ±L.
        damaged: stored rows that are replaced by masked rows.
        sources: as in `Batch`.
    """
    B, L = tokens.shape
    assert len(ends) == B, (len(ends), B)
    assert all(abs(row[-1]) == L for row in ends), "segments do not cover their row"
    counts = np.array([len(row) for row in ends])
    joined = np.concatenate(ends)
    row = np.arange(B).repeat(counts)  # of each segment
    number = np.arange(len(row)) - (counts.cumsum() - counts)[row]
    cu_seqlens = np.zeros(len(row) + 1, dtype=np.int64)
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    stops[:] = segments.stops(joined) + row * L
    lengths = stops - starts

    flat = tokens.reshape(-1)
    labels = np.empty(B * L, dtype=np.int64)
    labels[:-1] = flat[1:]  # from the narrow tokens: a shifted copy between two int64 buffers is many times slower
    labels[stops - 1] = IGNORE
    for padding in segments.is_padding(joined).nonzero()[0]:
        labels[starts[padding] : stops[padding]] = IGNORE
    position_ids = starts.repeat(lengths)
    np.subtract(_cached_arange(B * L), position_ids, out=position_ids)
    return Batch(
        input_ids=tokens.astype(np.int64),
        labels=labels.reshape(B, L),
        position_ids=position_ids.reshape(B, L),
        seq_idx=number.astype(np.int32).repeat(lengths).reshape(B, L),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(lengths.max()),
        damaged=damaged,
        sources=sources,
    )


@lru_cache(maxsize=2)
def _cached_arange(count: int) -> np.ndarray:
    """Return 0, 1, 2, …: int64 [count], cached because making it takes as long as using it."""
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers
