"""The order of training as a function of (seed, token): nothing to store, nothing to replay on resume.

The packed rows of all sources form one endless sequence, independent of the training row length: the mixture assigns
each position to a source, and each source permutes its rows anew in every epoch. A training row is a slice of a packed
row, as long as the curriculum stage requires; slices are permuted within consecutive windows of the sequence. This
mixes thoroughly, and the slices of a packed row stay close enough to be served by one read. No window crosses a change
of length or of weights, so a change neither skips nor repeats rows.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fusiontree.data.mixture import Mixture

WINDOW_SLICES = 4096
KEPT_WINDOWS = 4  # a batch spans one or two windows; prefetching reaches into the next
_ROUNDS = 6


class Place(NamedTuple):
    """The location of a training row."""

    source: int  # index among the mixture's sources
    epoch: int  # of the source, from 0
    row: int  # packed row within the source
    part: int  # index of the slice, of the stage's length, within the packed row


class Stage(NamedTuple):
    """A range of training with rows of one length."""

    first_token: int  # in the global sequence; a multiple of the packed row's length
    seq_len: int  # tokens per training row


class RowOrder:
    """The locations of all training rows.

    Args:
        mixture: the sequence of packed rows.
        row_len: tokens per packed row.
        stages: ascending, the first at token 0; every length divides `row_len`.
        seed: selects the order.
    """

    def __init__(self, mixture: Mixture, row_len: int, stages: Sequence[Stage], seed: int):
        assert stages[0].first_token == 0, "no length for the first row"
        assert all(row_len % stage.seq_len == stage.first_token % row_len == 0 for stage in stages), stages
        self.mixture, self.row_len, self.stages, self.seed = mixture, row_len, tuple(stages), seed
        self._stage_starts = [stage.first_token for stage in stages]
        cuts = {stage.first_token // row_len for stage in stages} | {phase.first for phase in mixture.phases}
        self._cuts = sorted(cuts if mixture.end is None else cuts | {mixture.end})
        self._window = lru_cache(KEPT_WINDOWS)(self._make_window)
        self._recent = _Window(0, 0, 1, [], [], [], [])  # most rows are in the same window as the row before

    def stage(self, token: int) -> Stage:
        """Return the stage that trains on `token` of the global sequence."""
        return self.stages[bisect_right(self._stage_starts, token) - 1]

    def locate(self, token: int) -> Place:
        """Locate the training row that begins at `token` of the global sequence, in O(1)."""
        window = self._recent
        if not window.first_token <= token < window.end_token:
            seq_len = self.stage(token).seq_len
            window = self._recent = self._window(*self._window_bounds(token // self.row_len, seq_len), seq_len)
        return window.place(token)

    def _window_bounds(self, row: int, seq_len: int) -> tuple[int, int, str]:
        """Return the window around packed row `row` as (first row, end row, name of its permutation key)."""
        cut = bisect_right(self._cuts, row)
        begin, ends, epoch = self._cuts[cut - 1], self._cuts[cut : cut + 1], 0
        if len(self.mixture.sources) == 1:  # the source's epochs are the sequence's: no window crosses them
            rows = self.mixture.sources[0].rows
            epoch = row // rows
            begin, ends = max(begin, epoch * rows), [*ends, (epoch + 1) * rows]
        size = max(1, WINDOW_SLICES * seq_len // self.row_len)
        number = (row - begin) // size
        first = begin + number * size
        return first, min(first + size, *ends) if ends else first + size, f"{epoch}/{number}"

    def _make_window(self, first: int, end: int, name: str, seq_len: int) -> "_Window":
        sources, epochs, rows = self._packed_rows(first, end)
        slices = self.row_len // seq_len
        order = permute(np.arange((end - first) * slices), (end - first) * slices, self._key(name))
        packed, parts = np.divmod(order, slices)
        lists = [values.tolist() for values in (sources[packed], epochs[packed], rows[packed], parts)]
        return _Window(first * self.row_len, end * self.row_len, seq_len, *lists)

    def _packed_rows(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, epoch and row within the source, int64 each, of packed rows `first` to `end` - 1."""
        located = np.array([self.mixture.locate(row) for row in range(first, end)])
        found, ordinals = located[:, 0], located[:, 1]
        sizes = np.array([source.rows for source in self.mixture.sources])
        epochs, rows = np.divmod(ordinals, sizes[found])
        for source, epoch in {*zip(found.tolist(), epochs.tolist(), strict=True)}:
            chosen = (found == source) & (epochs == epoch)
            name = self.mixture.sources[source].name
            key = self._key(*([name] if name else []), epoch, "rows")
            rows[chosen] = permute(rows[chosen], int(sizes[source]), key)
        return found, epochs, rows

    def _key(self, *parts: object) -> int:
        text = "/".join(map(str, (self.seed, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class _Window(NamedTuple):
    """The training rows of a window, in training order."""

    first_token: int
    end_token: int
    seq_len: int
    sources: list[int]
    epochs: list[int]
    rows: list[int]
    parts: list[int]

    def place(self, token: int) -> Place:
        number, rest = divmod(token - self.first_token, self.seq_len)
        assert rest == 0, f"no training row begins at token {token}"
        return Place(self.sources[number], self.epochs[number], self.rows[number], self.parts[number])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map `index`, int64 [n], through the permutation of range(size) that the 64-bit `key` selects.

    A Feistel network permutes the next power of four. Images outside the range are permuted again until they fall
    inside (cycle walking), which keeps the map a bijection.
    """
    assert len(index) == 0 or 0 <= index.min() <= index.max() < size, size
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    image = index.astype(np.uint64)
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        left, right = image[outside] >> half, image[outside] & mask
        for turn in range(_ROUNDS):
            mixed = _mix(np.uint64(key) + right * np.uint64(_ROUNDS) + np.uint64(turn))
            left, right = right, left ^ (mixed & mask)
        image[outside] = left << half | right
        outside = image >= size
    return image.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer: every bit of the result depends on every bit of `value`, uint64, modulo 2^64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
