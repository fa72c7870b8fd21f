"""Batches keep documents apart, and their sequence depends on neither ranks nor history."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_split

from fusiontree.data import segments
from fusiontree.data.batch import IGNORE, Batch, collate
from fusiontree.data.format import Dataset, Manifest, TokenizerInfo
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream, single_source_recipe, validation_batches
from fusiontree.errors import UserError

ROW, PAD = 32, 1
X = IGNORE


def make_dataset(folder: Path, rows: list[PackedRow], split: str = "train") -> Dataset:
    splits = {name: write_split(folder, name, rows if name == split else [], "s") for name in ("train", "validation")}
    Manifest(ROW, "uint16", "s", TokenizerInfo("f", 60_000, 0, PAD), splits).save(folder)
    return Dataset(folder, split)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Build a dataset of 40 rows in which every token encodes its place: 32 * row + position + 2."""
    rows = [
        PackedRow(
            tokens=np.arange(ROW * i + 2, ROW * (i + 1) + 2, dtype=np.uint16),
            ends=np.array([20, ROW], dtype=np.int32),
            spans=[Span(f"{i}a", 0, 20, 0), Span(f"{i}b", 20, 12, 0)],
        )
        for i in range(40)
    ]
    return make_dataset(tmp_path_factory.mktemp("dataset"), rows)


def test_collate_row_with_padding_in_the_middle() -> None:
    tokens = np.array([[5, 6, 0, PAD, 7, 8, 9, 0], [3, 4, 5, 6, 7, 8, 9, 0]], dtype=np.uint16)
    batch = collate(tokens, [np.array([3, -4, 8], np.int32), np.array([8], np.int32)])
    assert batch.input_ids.tolist() == tokens.tolist()
    assert batch.labels.tolist() == [[6, 0, X, X, 8, 9, 0, X], [4, 5, 6, 7, 8, 9, 0, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0] * 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 16]
    assert batch.max_seqlen == 8
    assert batch.real_tokens == 12
    assert [a.dtype.name for a in (batch.input_ids, batch.labels, batch.position_ids)] == ["int64"] * 3
    assert [a.dtype.name for a in (batch.seq_idx, batch.cu_seqlens)] == ["int32"] * 2


@pytest.mark.parametrize(
    ("ends", "slices"),
    [
        ([3, -10, 28, -32], [[3, -8], [-2, 8], [8], [4, -8]]),  # both parts of a cut segment keep its kind
        ([8, 16, 32], [[8], [8], [8], [8]]),  # a bound at the edge of a slice gives no empty segment
        ([1, 2, -7, 9, 24, -25, 26, 32], [[1, 2, -7, 8], [1, 8], [8], [-1, 2, 8]]),
        ([-32], [[-8]] * 4),
    ],
)
def test_slice_keeps_the_bounds_inside_it(ends: list[int], slices: list[list[int]]) -> None:
    row = np.array(ends, dtype=np.int32)
    assert [part.tolist() for part in segments.cut(row, 8)] == slices
    assert [part.tolist() for part in segments.cut(row, 32)] == [ends]


def make_stream(
    dataset: Dataset, seq_len: int, seed: int, batch_rows: int, rank: int, world: int, micro_rows: int
) -> TrainStream:
    recipe = single_source_recipe(seed, batch_rows * seq_len, seq_len)
    return TrainStream(Sources({"": dataset}), recipe, micro_rows, rank, world)


def rows_of(stream_ranks: list[list[Batch]]) -> list[int]:
    """Return the first tokens of one step's rows in global order, from each rank's micro-batches."""
    return [int(t) for m in zip(*stream_ranks, strict=True) for batch in m for t in batch.input_ids[:, 0]]


def test_global_sequence_does_not_depend_on_ranks(dataset: Dataset) -> None:
    def sequence(world: int, micro: int) -> list[list[int]]:
        streams = [make_stream(dataset, 8, 3, 16, rank, world, micro) for rank in range(world)]
        return [rows_of([next(stream) for stream in streams]) for _ in range(12)]

    alone = sequence(1, 16)
    assert sequence(2, 4) == alone
    assert sequence(4, 1) == alone
    assert sequence(1, 2) == alone


def test_epoch_contains_each_slice_once(dataset: Dataset) -> None:
    stream = make_stream(dataset, 8, 0, 16, 0, 1, 16)
    seen = [token for _ in range(10) for token in rows_of([next(stream)])]
    assert sorted(seen) == list(range(2, 40 * ROW + 2, 8))


def test_step_does_not_depend_on_earlier_steps(dataset: Dataset) -> None:
    walked = make_stream(dataset, 8, 0, 16, 0, 1, 4)
    for _ in range(25):
        expected = next(walked)
    fresh = make_stream(dataset, 8, 0, 16, 0, 1, 4)
    fresh.seek(24 * 16)
    assert [b.input_ids.tolist() for b in next(fresh)] == [b.input_ids.tolist() for b in expected]


def test_positions_of_a_cut_document_restart_in_the_next_slice(dataset: Dataset) -> None:
    stream = make_stream(dataset, 8, 0, 160, 0, 1, 160)
    (batch,) = next(stream)
    third = batch.input_ids[:, 0] % ROW == 16 + 2  # tokens 16 to 24 of a row: 4 of its first document, 4 of its second
    assert third.sum() == 40
    assert batch.position_ids[third].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 40
    assert (batch.labels[third] == IGNORE).tolist() == [[False, False, False, True] * 2] * 40


def padded_row(number: int) -> PackedRow:
    """Make a row of 32 tokens: a document of 5 tokens, then padding."""
    tokens = np.full(ROW, PAD, dtype=np.uint16)
    tokens[:5] = np.arange(5) + 10 * number + 10
    return PackedRow(tokens, np.array([5, -ROW], np.int32), [Span(str(number), 0, 5, 0)])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_does_not_depend_on_ranks(tmp_path: Path, world: int) -> None:
    held_out = make_dataset(tmp_path, [padded_row(i) for i in range(11)], "validation")
    ranks = [list(validation_batches(Sources({"": held_out}), 8, 2, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-11 // (2 * world))}
    assert all(batch.input_ids.shape == (2, 8) for batches in ranks for batch in batches)
    rows = sorted(row[0] for batches in ranks for batch in batches for row in batch.input_ids.tolist())
    assert [row for row in rows if row != PAD] == [10 * i + 10 for i in range(11)]  # no all-padding slice
    assert sum(batch.real_tokens for batches in ranks for batch in batches) == 11 * 4


def test_limited_validation_is_spread_over_the_split(dataset: Dataset, tmp_path: Path) -> None:
    batches = list(validation_batches(Sources({"": dataset}), 8, 1, 0, 1, limit_rows=4))
    assert [int(batch.input_ids[0, 0] - 2) // ROW for batch in batches] == [0, 10, 20, 30]


def test_indivisible_lengths_and_batches_are_refused_with_valid_ones(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"seq_len 12 .* 8 or 16"):
        make_stream(dataset, 12, 0, 8, 0, 1, 1)
    with pytest.raises(UserError, match=r"10 rows .* 2 ranks of 4 .* 8 or 16"):
        make_stream(dataset, 8, 0, 10, 0, 2, 4)
    with pytest.raises(UserError, match=r"seq_len 64 "):
        validation_batches(Sources({"": dataset}), 64, 1, 0, 1)


def test_empty_split_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="validation is empty"):
        Sources({"": Dataset(dataset.folder, "validation")})
