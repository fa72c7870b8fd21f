"""Which rows a rank trains on, as a function of the step, and the held-out rows it validates on."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from fusiontree.data.batch import Batch, collate, slice_ends
from fusiontree.data.format import Dataset
from fusiontree.data.order import RowOrder
from fusiontree.errors import UserError

CACHED_ROWS = 512  # packed rows kept, 32 MiB of 16-bit tokens: a whole window of the order from 8 slices a row on


class TrainStream:
    """The training batches of one rank.

    Step s owns the global training rows [s * batch_rows, (s + 1) * batch_rows), whatever the number of ranks.

    Args:
        dataset: the packed rows.
        seq_len: tokens per training row; divides the packed row.
        seed: chooses the order.
        batch_rows: training rows per step, over all ranks.
        rank: this process, from 0.
        world_size: processes that share each step.
        micro_rows: training rows per batch returned.

    Raises:
        UserError: the split is empty, or the numbers do not divide.
    """

    def __init__(
        self, dataset: Dataset, seq_len: int, seed: int, batch_rows: int, rank: int, world_size: int, micro_rows: int
    ):
        share = micro_rows * world_size
        if batch_rows < 1 or batch_rows % share:
            below = batch_rows // share * share
            fitting = f"{below} or {below + share}" if below else f"{share}"
            raise UserError(
                f"a batch of {batch_rows} rows does not divide among {world_size} ranks of {micro_rows} rows each; "
                f"nearest that do: {fitting} rows"
            )
        self.batch_rows, self.rank, self.world_size, self.micro_rows = batch_rows, rank, world_size, micro_rows
        self._slices = _Slices(dataset, seq_len)
        self._order = RowOrder(dataset.num_rows, self._slices.per_row, seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's batches of global step `step`, counted from 0."""
        firsts = range(
            step * self.batch_rows + self.rank * self.micro_rows,
            (step + 1) * self.batch_rows,
            self.world_size * self.micro_rows,
        )
        locate = self._order.locate
        return [self._slices.batch([locate(first + i)[1:] for i in range(self.micro_rows)]) for first in firsts]


def validation_batches(
    dataset: Dataset, seq_len: int, micro_rows: int, rank: int, world_size: int, limit_rows: int | None = None
) -> Iterator[Batch]:
    """This rank's share of the held-out slices, the same slices over all ranks for any number of them.

    Slices that are all padding are left out; of the others, `limit_rows` (None: all) are taken at even distances.
    Every rank yields equally many batches of `micro_rows` rows: the last ones are filled up with masked rows.

    Raises:
        UserError: the split is empty, or `seq_len` does not divide the packed row.
    """
    slices = _Slices(dataset, seq_len)
    real = slices.with_documents()
    count = len(real) if limit_rows is None else min(limit_rows, len(real))
    chosen = real[np.arange(count) * len(real) // max(1, count)].tolist()
    share = micro_rows * world_size
    firsts = range(rank * micro_rows, -(-count // share) * share, share)
    return (slices.batch(chosen[first : first + micro_rows], micro_rows) for first in firsts)


class _Slices:
    """A dataset's packed rows, cut to `seq_len`."""

    def __init__(self, dataset: Dataset, seq_len: int):
        row_len = dataset.manifest.row_len
        if dataset.num_rows == 0:
            raise UserError(f"{dataset.folder}: split {dataset.split} is empty; build it from more documents")
        if not 0 < seq_len <= row_len or row_len % seq_len:
            fitting = [length for length in range(1, row_len + 1) if row_len % length == 0]
            near = sorted(sorted(fitting, key=lambda length: abs(length - seq_len))[:2])
            raise UserError(
                f"data.seq_len {seq_len} does not divide the {row_len}-token rows of {dataset.folder}; "
                f"nearest that do: {' or '.join(map(str, near))}"
            )
        self.dataset, self.seq_len, self.per_row = dataset, seq_len, row_len // seq_len
        # a row's slices are used near one another: read and check it once
        self._row = lru_cache(CACHED_ROWS if self.per_row > 1 else 0)(dataset.row)

    def batch(self, places: Sequence[Sequence[int]], rows: int | None = None) -> Batch:
        """The slices at `places`, (packed row, slice) each, filled up to `rows` with masked rows."""
        B = len(places) if rows is None else rows
        tokens = np.full((B, self.seq_len), self.dataset.manifest.tokenizer.pad_id, dtype=np.int64)
        ends = [np.array([-self.seq_len], dtype=np.int32)] * B
        for i, (row, part) in enumerate(places):
            row_tokens, row_ends = self._row(row)
            tokens[i] = row_tokens[part * self.seq_len : (part + 1) * self.seq_len]
            ends[i] = slice_ends(row_ends, self.seq_len, part)
        return collate(tokens, ends)

    def with_documents(self) -> np.ndarray:
        """All (packed row, slice) that hold more than padding, in the order on disk: int64 [slices, 2]."""
        real = np.ones((self.dataset.num_rows, self.per_row), dtype=bool)
        padding = self.dataset.manifest.row_len - self.dataset.valid_tokens
        for row in np.flatnonzero(padding >= self.seq_len):  # in the others no slice can be empty
            ends = self._row(int(row))[1]
            real[row] = [(slice_ends(ends, self.seq_len, part) > 0).any() for part in range(self.per_row)]
        return np.argwhere(real)
