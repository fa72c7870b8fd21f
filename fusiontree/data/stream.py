"""The training rows of each rank as a function of the rows consumed so far, and the rows for validation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from fusiontree.data import segments
from fusiontree.data.batch import BadRow, Batch, collate
from fusiontree.data.mixture import Mixture, SourceRows
from fusiontree.data.order import Place, RowOrder, Stage
from fusiontree.data.readahead import BatchMaker, ReadAhead
from fusiontree.data.sources import Sources
from fusiontree.errors import UserError

CACHED_ROWS = 512  # packed rows; 32 MiB at 32,768 16-bit tokens each. Enough for a window with 8 slices per row or more
_LARGEST_BLOCK = 24 << 20  # bytes; glibc caps its threshold at 32 MiB


@dataclass(frozen=True)
class Recipe:
    """The settings that, with the shards, determine the global sequence of training rows."""

    seed: int
    batch_tokens: int  # per optimizer step, over all ranks
    lengths: tuple[tuple[int, int], ...]  # (first step, tokens per training row), ascending, the first at step 0
    weights: tuple[tuple[int, tuple[Fraction, ...]], ...]  # (first step, weight of each source), likewise
    max_epochs: tuple[Fraction | None, ...]  # of each source

    @property
    def seq_len(self) -> int:
        """Tokens per training row at the end of the curriculum; rows are counted at this length."""
        return self.lengths[-1][1]

    @property
    def batch_rows(self) -> int:
        """Rows of `seq_len` tokens per optimizer step."""
        return self.batch_tokens // self.seq_len


def single_source_recipe(seed: int, batch_tokens: int, seq_len: int) -> Recipe:
    """Return the recipe of a single source with one row length."""
    return Recipe(seed, batch_tokens, ((0, seq_len),), ((0, (Fraction(1),)),), (None,))


def make_order(sources: Sources, recipe: Recipe) -> RowOrder:
    """Return the order of the rows of `sources` under `recipe`.

    Raises:
        UserError: a length does not divide the packed row, or a table entry's step falls inside a packed row.
    """
    for _, length in recipe.lengths:
        _check_length(sources, length)
    row_len, tokens = sources.row_len, recipe.batch_tokens
    period = row_len // math.gcd(row_len, tokens)  # a step ends together with a packed row every `period` steps
    for step, _ in (*recipe.lengths, *recipe.weights):
        if step % period:
            below = step // period * period
            raise UserError(
                f"step {step} of data.curriculum or data.weights begins inside a packed row of {row_len} tokens; the "
                f"nearest steps that do not, at {tokens} tokens per step: {below} or {below + period}"
            )
    rows = [
        SourceRows(name, dataset.num_rows, cap)
        for name, dataset, cap in zip(sources.names, sources.datasets, recipe.max_epochs, strict=True)
    ]
    mixture = Mixture(rows, [(step * tokens // row_len, weights) for step, weights in recipe.weights])
    return RowOrder(mixture, row_len, [Stage(step * tokens, length) for step, length in recipe.lengths], recipe.seed)


class TrainStream:
    """The training batches of one rank, step by step: an iterator whose only state is `rows_consumed`.

    A step consists of the next `batch_tokens` tokens of the global sequence, for any number of ranks and workers. Rows
    are counted at the final length, so one integer is a position for all lengths.

    Args:
        sources: the packed rows.
        recipe: determines the order.
        micro_rows: rows of the final length per batch; earlier in the curriculum, as many tokens in more rows.
        rank: rank of this process, from 0.
        world_size: number of ranks.
        workers: prefetching threads; 0: each batch is made on demand.

    Raises:
        UserError: the batch does not divide among the ranks; also see `make_order`.
    """

    def __init__(
        self,
        sources: Sources,
        recipe: Recipe,
        micro_rows: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        share = micro_rows * world_size
        if recipe.batch_rows < 1 or recipe.batch_rows % share:
            below = recipe.batch_rows // share * share
            fitting = f"{below} or {below + share}" if below else f"{share}"
            raise UserError(
                f"a batch of {recipe.batch_rows} rows does not divide among {world_size} ranks of {micro_rows} rows "
                f"each; use {fitting} rows"
            )
        self.recipe, self.sources, self.order = recipe, sources, make_order(sources, recipe)
        self.rank, self.world_size, self.micro_tokens = rank, world_size, micro_rows * recipe.seq_len
        self.rows_consumed = 0  # rows of the final length, over all ranks
        self._skipped: list[tuple[int, int]] = []  # ranges of rows consumed, sorted
        self._slices = _Slices(sources)
        self._workers = workers
        _keep_freed_memory()
        self._ahead: ReadAhead | None = None

    def seek(self, rows_consumed: int) -> None:
        """Move to the position after `rows_consumed` rows, in O(1)."""
        assert rows_consumed % self.recipe.batch_rows == 0, "not the end of a step"
        self.close()
        self.rows_consumed = rows_consumed

    def skip_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Skip the steps within each of `ranges`, (first, end) in rows consumed, from the next step on."""
        self.close()
        self._skipped = sorted(ranges)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> list[Batch]:
        """Return this rank's batches of the next step, in order; raise StopIteration when the sources are used up."""
        if self._ahead is None:
            step_batches = self.recipe.batch_tokens // (self.micro_tokens * self.world_size)
            self._ahead = ReadAhead(self._steps(self.rows_consumed), self._workers, step_batches)
        ahead = self._ahead
        step = ahead.take()
        if step.failure is not None:
            ahead.fail(step)
        if step.ends_group:
            ahead.start_group()
        self.rows_consumed = step.rows_consumed
        return step.batches

    @property
    def ready(self) -> bool:
        """True if the next step's batches can be taken without waiting."""
        return self._ahead is not None and self._ahead.ready

    def close(self) -> None:
        """Stop the workers; the next step restarts them."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def rows_consumed_after(self, steps: int) -> int:
        """Return the rows consumed after `steps` more steps and the skipped ranges up to the step after them."""
        return self._skip(self.rows_consumed + steps * self.recipe.batch_rows, self.rows_consumed)

    def places(self, rows_consumed: int) -> list[list[Place]]:
        """Return the places of the rows of this rank's batches in the step after `rows_consumed` rows."""
        first = rows_consumed * self.recipe.seq_len
        length = self.order.stage(first).seq_len
        starts = range(
            first + self.rank * self.micro_tokens,
            first + self.recipe.batch_tokens,
            self.world_size * self.micro_tokens,
        )
        locate = self.order.locate
        return [[locate(token) for token in range(start, start + self.micro_tokens, length)] for start in starts]

    @property
    def last_step(self) -> int | None:
        """Number of steps until the sources are used up; None: never."""
        end = self.order.mixture.end
        return None if end is None else end * self.sources.row_len // self.recipe.batch_tokens

    def _steps(self, rows_consumed: int) -> Iterator[tuple[int, list[BatchMaker]]]:
        """Yield (rows consumed after the step, makers of its batches) for each step after `rows_consumed` rows."""
        row = self._skip(rows_consumed, rows_consumed)
        while self.last_step is None or row // self.recipe.batch_rows < self.last_step:
            length = self.order.stage(row * self.recipe.seq_len).seq_len
            makers: list[BatchMaker] = [partial(self._slices.batch, places, length) for places in self.places(row)]
            row += self.recipe.batch_rows
            yield row, makers
            row = self._skip(row, row)

    def _skip(self, row: int, since: int) -> int:
        """Return position `row` advanced by all ranges skipped between `since` and the result."""
        for first, end in self._skipped:
            if first <= row and since < end:
                row += end - max(first, since)  # a range that began before `since` counts only from there
        return row


def validation_batches(
    sources: Sources, seq_len: int, micro_rows: int, rank: int, world_size: int, limit_rows: int | None = None
) -> Iterator[Batch]:
    """Return this rank's batches of held-out slices; the slices of all ranks do not depend on the number of ranks.

    Slices of padding alone are omitted; of the others, `limit_rows` (None: all) are taken at equal distances. Every
    rank gets the same number of batches of `micro_rows` rows; the last batches are filled with masked rows.

    Raises:
        UserError: `seq_len` does not divide the packed row.
    """
    _check_length(sources, seq_len)
    slices = _Slices(sources)
    candidates = slices.with_documents(seq_len)
    count = len(candidates) if limit_rows is None else min(limit_rows, len(candidates))
    chosen = [candidates[i * len(candidates) // count] for i in range(count)]
    share = micro_rows * world_size
    firsts = range(rank * micro_rows, -(-count // share) * share, share)
    return (slices.batch(chosen[first : first + micro_rows], seq_len, micro_rows) for first in firsts)


class _CutRow(NamedTuple):
    """A packed row, cut into slices."""

    tokens: np.ndarray  # [slices, seq_len]
    ends: list[np.ndarray]  # of each slice, int32 [segments]
    damage: BadRow | None


class _Slices:
    """The packed rows of all sources, cut to a given length."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self._cached_cut = lru_cache(CACHED_ROWS)(self._cut)

    def _cut(self, source: int, row: int, seq_len: int) -> _CutRow:
        tokens, ends, damage = self.sources.read(source, row)
        return _CutRow(tokens.reshape(-1, seq_len), segments.cut(ends, seq_len), damage)

    def batch(self, places: Sequence[Place], seq_len: int, rows: int | None = None) -> Batch:
        """Collate the slices at `places`, filled up to `rows` with masked rows."""
        B = len(places) if rows is None else rows
        # the slices of a packed row are used close together: read, verify and cut the row once
        cut = self._cached_cut if seq_len < self.sources.row_len else self._cut
        tokens = np.empty((B, seq_len), dtype=self.sources.dtype)
        tokens[len(places) :] = self.sources.pad_id
        ends = [segments.only_padding(seq_len)] * B
        bad: dict[BadRow, None] = {}
        for i, (source, _, row, part) in enumerate(places):
            row_tokens, row_ends, damage = cut(source, row, seq_len)
            if damage is not None:
                bad[damage] = None
            tokens[i], ends[i] = row_tokens[part], row_ends[part]
        return collate(tokens, ends, tuple(bad), tuple(place.source for place in places))

    def with_documents(self, seq_len: int) -> list[Place]:
        """Return all slices that contain documents, in disk order."""
        found = []
        for source, dataset in enumerate(self.sources.datasets):
            padding = self.sources.row_len - dataset.valid_tokens
            for row in range(dataset.num_rows):
                parts = [*range(self.sources.row_len // seq_len)]
                if padding[row] >= seq_len:  # with less padding no slice can be empty, and the row need not be read
                    ends_by_part = self._cached_cut(source, row, seq_len).ends
                    parts = [part for part, ends in enumerate(ends_by_part) if not segments.is_padding(ends).all()]
                found += [Place(source, 0, row, part) for part in parts]
        return found


def _keep_freed_memory() -> None:
    """Make the allocator reuse the memory of batches; unmapping and remapping it would take most of a batch's time.

    glibc maps each block above a threshold separately, and raises the threshold to the size of the largest such block
    freed so far (mallopt(3), M_MMAP_THRESHOLD). Freeing one large block here therefore keeps batches on the heap.
    """
    np.empty(_LARGEST_BLOCK, dtype=np.uint8)


def _check_length(sources: Sources, seq_len: int) -> None:
    row_len = sources.row_len
    if not 0 < seq_len <= row_len or row_len % seq_len:
        fitting = [length for length in range(1, row_len + 1) if row_len % length == 0]
        near = sorted(sorted(fitting, key=lambda length: abs(length - seq_len))[:2])
        raise UserError(
            f"data.seq_len {seq_len} does not divide the {row_len}-token rows of {sources.datasets[0].location}; "
            f"use {' or '.join(map(str, near))}"
        )
