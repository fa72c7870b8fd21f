"""The order of training: every slice once per epoch, well mixed, another for every epoch and seed."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data import order
from fusiontree.data.order import RowOrder, permute


def epoch_of(rows: RowOrder, epoch: int) -> list[tuple[int, int]]:
    size = rows.num_rows * rows.slices_per_row
    located = [rows.locate(i) for i in range(epoch * size, (epoch + 1) * size)]
    assert {found[0] for found in located} == {epoch}
    return [found[1:] for found in located]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 8, 16]), st.integers(0, 5), st.integers(0, 3), st.integers(1, 64))
def test_an_epoch_holds_each_slice_once(num_rows: int, slices: int, seed: int, epoch: int, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_SLICES", window)
        rows = RowOrder(num_rows, slices, seed)
    assert sorted(epoch_of(rows, epoch)) == [(row, part) for row in range(num_rows) for part in range(slices)]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [tuple(epoch_of(RowOrder(40, 4, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    for one in orders:
        for other in orders:
            assert one is other or sum(map(tuple.__eq__, one, other)) < 12  # by chance 1 of 160 agrees


def test_the_order_is_the_same_in_every_process_and_release() -> None:
    assert [RowOrder(1000, 8, 7).locate(i) for i in (0, 1, 8000)] == [(0, 653, 0), (0, 701, 2), (1, 8, 1)]


def test_neighbours_in_the_order_are_no_neighbours_on_disk() -> None:
    places = epoch_of(RowOrder(2000, 4, 0), 0)
    near = sum(abs(one[0] - other[0]) <= 10 for one, other in pairwise(places))
    assert near < 0.03 * len(places)  # by chance about 21 of 2000 rows are that near


def test_a_window_touches_few_rows() -> None:
    places = epoch_of(RowOrder(2000, 8, 0), 0)
    assert len({row for row, _ in places[:4096]}) == 512


def test_no_image_is_preferred() -> None:
    counts = [0] * 6
    for key in range(6000):
        counts[permute(2, 6, key * 0x9E3779B97F4A7C15 % 2**64)] += 1
    assert all(850 < count < 1150 for count in counts)  # 1000 expected, standard deviation 29
