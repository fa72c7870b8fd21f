"""At every row, each source has exactly its share, until its epochs are used up."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.mixture import Mixture, SourceRows


def mixture(weights: list, rows: int = 10, caps: list | None = None) -> Mixture:
    sources = [SourceRows(f"s{i}", rows, cap) for i, cap in enumerate(caps or [None] * len(weights))]
    return Mixture(sources, [(0, [Fraction(w) for w in weights])])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), st.integers(0, 10**15))
def test_counts_are_exact_to_two_rows_at_any_row(weights: list[int], rows: int) -> None:
    counts = mixture(weights).counts(rows)
    assert sum(counts) == rows
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(weight * rows, sum(weights))) < 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), st.integers(0, 10**12))
def test_locating_and_counting_agree(weights: list[int], first: int) -> None:
    mixed = mixture(weights)
    counts = mixed.counts(first)
    for row in range(first, first + 40):
        source, index = mixed.locate(row)
        assert index == counts[source]
        counts[source] += 1
        assert mixed.counts(row + 1) == counts


def test_decimal_weights_are_exact() -> None:
    assert mixture([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]).counts(10**18) == [
        7 * 10**17,
        2 * 10**17,
        10**17,
    ]


def test_weights_change_at_their_row() -> None:
    sources = [SourceRows("a", 1000), SourceRows("b", 1000)]
    mixed = Mixture(sources, [(0, [Fraction(1), Fraction(0)]), (100, [Fraction(1), Fraction(3)])])
    assert mixed.counts(100) == [100, 0]
    assert mixed.counts(300) == [150, 150]
    assert mixed.locate(99) == (0, 99)
    assert {mixed.locate(row)[0] for row in range(100, 104)} == {0, 1}


def test_share_of_used_up_source_goes_to_the_others() -> None:
    mixed = mixture([2, 1, 1], caps=[Fraction(3), None, None])
    (first, second) = mixed.phases
    assert second.first == 60  # half of 60 rows is 3 epochs of 10
    assert second.weights == (0, Fraction(1, 2), Fraction(1, 2))
    assert mixed.counts(1060) == [30, 515, 515]
    assert mixed.end is None
    assert first.weights == (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
    st.lists(st.fractions(Fraction(1, 3), 4, max_denominator=7), min_size=5, max_size=5),
    st.integers(1, 100),
)
def test_caps_are_reached_and_never_exceeded(weights: list[int], later: list[int], caps: list, change: int) -> None:
    sources = [SourceRows(f"s{i}", 10, cap) for i, (cap, _) in enumerate(zip(caps, weights, strict=False))]
    table = [(0, [Fraction(w) for w in weights]), (change, [Fraction(w) for w in later[: len(weights)]])]
    mixed = Mixture(sources, table)
    assert mixed.end is not None
    counts = [0] * len(sources)
    for row in range(mixed.end):
        source, index = mixed.locate(row)
        assert index == counts[source]
        counts[source] += 1
        assert counts[source] <= sources[source].limit
    last = table[1][1] if mixed.end >= change else table[0][1]
    for source, weight, count in zip(sources, last, counts, strict=True):
        assert count == source.limit or not weight


@pytest.mark.parametrize("caps", [[Fraction(1), Fraction(2)], [Fraction(5, 2), Fraction(1, 2)]])
def test_mixture_ends_when_all_sources_are_used_up(caps: list[Fraction]) -> None:
    mixed = mixture([1, 5], caps=caps)
    assert mixed.end == 30
    assert mixed.counts(30) == [int(10 * cap) for cap in caps]
