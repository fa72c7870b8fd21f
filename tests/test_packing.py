"""Packing keeps every token, cuts no document that fits, and adds little padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data import packing
from fusiontree.data.packing import PackedRow, pack
from fusiontree.errors import UserError

CELL, ROW, PAD = 8, 64, 0


def packed(lengths: list[int], window: int = 10_000) -> list[PackedRow]:
    """Pack documents of the given lengths; their tokens are 1, 2, 3, … over all documents."""
    bounds = np.cumsum([1, *lengths])
    documents = [(str(i), np.arange(bounds[i], bounds[i + 1], dtype=np.uint32)) for i in range(len(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CARRIED_ROWS", 2)  # few, so small cases also close rows that have room
        return list(pack(iter(documents), ROW, PAD, cell=CELL, window=window))


LENGTHS = st.lists(st.integers(1, 3 * ROW), min_size=1, max_size=60)
WINDOWS = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, WINDOWS)
def test_every_document_appears_once_and_complete(lengths: list[int], window: int) -> None:
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for row in packed(lengths, window):
        for span in row.spans:
            tokens = row.tokens[span.start : span.start + span.length]
            pieces.setdefault(span.id, []).append((span.offset, tokens))
    first = 1
    for i, length in enumerate(lengths):
        found = sorted(pieces[str(i)], key=lambda piece: piece[0])
        assert [offset for offset, _ in found] == list(range(0, length, ROW))
        assert np.concatenate([tokens for _, tokens in found]).tolist() == list(range(first, first + length))
        first += length


@settings(max_examples=60, deadline=None)
@given(LENGTHS, WINDOWS)
def test_slicing_cuts_only_documents_longer_than_the_slice(lengths: list[int], window: int) -> None:
    for row in packed(lengths, window):
        for span in row.spans:
            for seq_len in (CELL, 2 * CELL, 4 * CELL, ROW):
                if span.length <= seq_len:
                    assert span.start // seq_len == (span.start + span.length - 1) // seq_len


@settings(max_examples=60, deadline=None)
@given(LENGTHS, WINDOWS)
def test_ends_match_documents_and_padding(lengths: list[int], window: int) -> None:
    for row in packed(lengths, window):
        bounds = [0, *np.abs(row.ends).tolist()]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == ROW
        segments = list(zip(bounds, bounds[1:], row.ends > 0, strict=False))
        assert [(start, end - start) for start, end, real in segments if real] == [
            (span.start, span.length) for span in row.spans
        ]
        assert all((row.tokens[start:end] != PAD).all() == real for start, end, real in segments)


def test_padding_is_only_at_the_ends_of_cells() -> None:
    lengths = np.random.default_rng(1).integers(1, ROW, 200).tolist()
    for row in packed(lengths):
        empty = (row.tokens == PAD).reshape(-1, CELL)
        assert not (empty[:, :-1] & ~empty[:, 1:]).any()


@pytest.mark.parametrize(
    "lengths",
    [
        [4 * CELL + 1, CELL - 1, 2 * CELL, CELL],  # the first document's fifth cell is shared, the next three are free
        [4 * CELL, 3 * CELL, CELL],
    ],
)
def test_documents_that_fill_a_row_share_one(lengths: list[int]) -> None:
    rows = packed(lengths)
    assert len(rows) == 1
    assert (rows[0].tokens != PAD).all()


def test_rows_with_room_are_filled_from_the_next_window() -> None:
    assert len(packed([ROW // 2, ROW // 2], window=1)) == 1


def test_rows_are_yielded_before_the_documents_end() -> None:
    fed = 0

    def documents():
        nonlocal fed
        for fed in range(1000):
            yield str(fed), np.ones(ROW, dtype=np.uint16)

    next(pack(documents(), ROW, PAD, cell=CELL, window=10))
    assert fed < 20


def test_number_of_open_rows_is_bounded() -> None:
    fed = 0

    def documents():
        nonlocal fed
        for fed in range(1000):
            yield str(fed), np.ones(ROW // 2 + 1, dtype=np.uint16)  # no two fit in one row

    next(pack(documents(), ROW, PAD, cell=CELL, window=10))
    assert fed < 100


def test_padding_of_ten_thousand_lognormal_documents_is_small() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6.5, 1.2, 10_000)).astype(int)
    rows = list(pack(((str(i), np.ones(n, np.uint16)) for i, n in enumerate(lengths)), 32768, PAD))
    assert 1 - lengths.sum() / (len(rows) * 32768) < 0.003


@pytest.mark.parametrize("row_len", [0, 1, 4097, 12288, 40000])
def test_row_length_that_cannot_be_halved_to_cells_is_refused(row_len: int) -> None:
    with pytest.raises(UserError, match="row length"):
        next(pack(iter([("a", np.ones(1, np.uint16))]), row_len, PAD))
