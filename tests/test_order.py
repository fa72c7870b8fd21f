"""The order of training: every slice once per epoch, well mixed, different for every epoch and seed."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data import order
from fusiontree.data.mixture import Mixture, SourceRows
from fusiontree.data.order import Place, RowOrder, Stage, permute

ROW = 16  # tokens of a packed row


def one_source(num_rows: int, slices: int, seed: int, *more: Stage) -> RowOrder:
    mixture = Mixture([SourceRows("", num_rows)], [(0, [Fraction(1)])])
    return RowOrder(mixture, ROW, [Stage(0, ROW // slices), *more], seed)


def places(rows: RowOrder, first: int, end: int) -> list[Place]:
    """Return the training rows between two tokens of the global sequence."""
    found, token = [], first
    while token < end:
        found.append(rows.locate(token))
        token += rows.stage(token).seq_len
    return found


def epoch_of(rows: RowOrder, epoch: int) -> list[tuple[int, int]]:
    size = rows.mixture.sources[0].rows * ROW
    located = places(rows, epoch * size, (epoch + 1) * size)
    assert {found.epoch for found in located} == {epoch}
    return [(found.row, found.part) for found in located]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def plain_image(index: int, size: int, key: int) -> int:
    """Compute `permute` of one index with Python integers."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    half = next(bits for bits in range(1, 64) if 4**bits >= size)
    while True:
        left, right = divmod(index, 2**half)
        for turn in range(6):
            left, right = right, left ^ (mix((key + right * 6 + turn) % 2**64) % 2**half)
        index = left * 2**half + right
        if index < size:
            return index


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_permute_matches_python_integers(size: int, key: int, index: int) -> None:
    assert permute(np.array([index % size]), size, key).tolist() == [plain_image(index % size, size, key)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 8, 16]), st.integers(0, 5), st.integers(0, 3), st.integers(1, 64))
def test_epoch_contains_each_slice_once(num_rows: int, slices: int, seed: int, epoch: int, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_SLICES", window)
        found = epoch_of(one_source(num_rows, slices, seed), epoch)
    assert sorted(found) == [(row, part) for row in range(num_rows) for part in range(slices)]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [tuple(epoch_of(one_source(40, 4, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    for one in orders:
        for other in orders:
            assert one is other or sum(map(tuple.__eq__, one, other)) < 12  # random orders agree in 1 of 160 places


def test_order_is_the_same_in_every_process_and_release() -> None:
    rows = one_source(1000, 8, 7)
    assert [rows.locate(i * 2) for i in (0, 1, 8000)] == [(0, 0, 653, 0), (0, 0, 701, 2), (0, 1, 8, 1)]


def test_neighbours_in_the_order_are_not_neighbours_on_disk() -> None:
    found = epoch_of(one_source(2000, 4, 0), 0)
    near = sum(abs(one[0] - other[0]) <= 10 for one, other in pairwise(found))
    assert near < 0.03 * len(found)  # in a random order about 21 of 2000 rows are this near


def test_window_contains_few_packed_rows() -> None:
    found = epoch_of(one_source(2000, 8, 0), 0)
    assert len({row for row, _ in found[:4096]}) == 512


@pytest.mark.slow
def test_images_are_uniformly_distributed() -> None:
    counts = [0] * 6
    for key in range(6000):
        counts[int(permute(np.array([2]), 6, key * 0x9E3779B97F4A7C15 % 2**64)[0])] += 1
    assert all(850 < count < 1150 for count in counts)  # 1000 expected, standard deviation 29


# --- several lengths and sources -------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=3),
    lengths=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=3, unique=True),
    gaps=st.lists(st.integers(1, 50), min_size=6, max_size=6),
    caps=st.lists(st.one_of(st.none(), st.integers(1, 3)), min_size=4, max_size=4),
    window=st.integers(1, 80),
    seed=st.integers(0, 3),
)
def test_every_slice_of_every_epoch_comes_once_across_all_changes(
    sizes: list[int], weights: list, lengths: list[int], gaps: list[int], caps: list, window: int, seed: int
) -> None:
    """Changes of lengths and weights, and used-up sources, neither skip nor repeat a slice."""
    sources = [
        SourceRows(f"s{i}", size, None if cap is None else Fraction(cap))
        for i, (size, cap) in enumerate(zip(sizes, caps, strict=False))
    ]
    shares = [[Fraction(w) for w in row[: len(sizes)]] for row in weights]
    shares = [row if any(row) else [Fraction(1)] * len(row) for row in shares]
    mixture = Mixture(sources, [(sum(gaps[:i]), row) for i, row in enumerate(shares)])
    stages = [Stage(sum(gaps[3 : 3 + i]) * ROW, length) for i, length in enumerate(sorted(lengths))]
    total = 300 if mixture.end is None else min(300, mixture.end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_SLICES", window)
        rows = RowOrder(mixture, ROW, stages, seed)
        seen: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        token = end = 0
        while token < end or token < total * ROW:  # up to the end of the last window
            length = rows.stage(token).seq_len
            end = rows._window_bounds(token // ROW, length)[1] * ROW
            place = rows.locate(token)
            seen.setdefault(place[:3], []).append((place.part * length, length))
            token += length
    for covered in seen.values():  # the slices of a packed row cover it without gap or overlap
        ends = [0, *(start + length for start, length in sorted(covered))]
        assert [start for start, _ in sorted(covered)] == ends[:-1]
        assert ends[-1] == ROW
    for number, (source, count) in enumerate(zip(sources, mixture.counts(token // ROW), strict=True)):
        assert sum(found == number for found, _, _ in seen) == count
        for epoch in range(count // source.rows):  # a complete epoch has every row once
            assert sorted(row for found, e, row in seen if (found, e) == (number, epoch)) == [*range(source.rows)]


def test_length_changes_at_its_token_between_windows() -> None:
    rows = one_source(100, 8, 0, Stage(30 * ROW, 8), Stage(75 * ROW, 16))
    for first, end, length in ((0, 30, 2), (30, 75, 8), (75, 100, 16)):
        assert {rows.stage(token).seq_len for token in range(first * ROW, end * ROW)} == {length}
        found = places(rows, first * ROW, end * ROW)
        assert len(found) == (end - first) * ROW // length
        assert len({place.row for place in found}) == end - first
    assert len({place.row for place in places(rows, 0, 100 * ROW)}) == 100


def test_sequence_of_packed_rows_does_not_depend_on_lengths() -> None:
    """Another curriculum trains on the same rows in the same windows."""
    long, short = one_source(5000, 1, 3), one_source(5000, 16, 3)
    first = {place.row for place in places(long, 0, 4096 * ROW)}
    assert first == {place.row for place in places(short, 0, 4096 * ROW)}


def test_single_source_does_not_mix_epochs_under_a_curriculum() -> None:
    rows = one_source(7, 4, 0, Stage(10 * ROW, 8))
    for epoch in range(4):
        assert {place.epoch for place in places(rows, epoch * 7 * ROW, (epoch + 1) * 7 * ROW)} == {epoch}


def test_weights_change_at_their_token_and_not_before() -> None:
    table = [(0, [Fraction(1), Fraction(0)]), (50, [Fraction(0), Fraction(1)])]
    rows = RowOrder(Mixture([SourceRows("a", 70), SourceRows("b", 70)], table), ROW, [Stage(0, 4)], 0)
    assert {place.source for place in places(rows, 0, 50 * ROW)} == {0}
    assert {place.source for place in places(rows, 50 * ROW, 120 * ROW)} == {1}
