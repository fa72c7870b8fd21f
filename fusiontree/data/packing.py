"""Nested packing of documents into rows: a curriculum stage of a cell or more cuts no document that would fit.

A row is C cells of `cell` tokens, C a power of two. A document that needs c cells begins at a multiple of the next
power of two >= c, so slicing rows at any power-of-two number of cells cuts only documents longer than the slice.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fusiontree.errors import UserError

PACKER_VERSION = 1  # incremented when the same documents are packed differently
CELL = 4096  # tokens
WINDOW_DOCUMENTS = 10_000
WINDOW_TOKENS = 1 << 26  # limits memory when documents are long
CARRIED_ROWS = 64  # rows kept open from one window to the next


@dataclass(frozen=True)
class Span:
    """The position of a document in its row; a document longer than a row has several spans, each in another row."""

    id: str
    start: int  # first token in the row
    length: int  # tokens
    offset: int  # tokens of the document before this span, in other rows; 0: the document begins here
    continues: bool = False  # the document continues in another row


@dataclass(frozen=True)
class PackedRow:
    """A packed row."""

    tokens: np.ndarray  # [row_len]
    ends: np.ndarray  # int32 [segments], exclusive ends, ascending in absolute value; negative: the segment is padding
    spans: list[Span]  # in row order


@dataclass(frozen=True)
class _Piece:
    id: str
    offset: int
    tokens: np.ndarray
    continues: bool


def check_row_len(row_len: int, cell: int = CELL) -> None:
    """Check that a row is a power of two of cells, or no longer than one cell.

    Raises:
        UserError: it is neither.
    """
    cells = row_len // cell
    if row_len < 2 or (row_len > cell and (row_len % cell or cells & (cells - 1))):
        raise UserError(f"row length {row_len} is not supported; use 2 to {cell}, or {cell} times a power of two")


def pack(
    documents: Iterable[tuple[str, np.ndarray]],
    row_len: int,
    pad_id: int,
    cell: int = CELL,
    window: int = WINDOW_DOCUMENTS,
) -> Iterator[PackedRow]:
    """Pack a stream of documents; the same stream gives the same rows.

    Args:
        documents: (id, tokens [n]) with n >= 1, including the end-of-document token, all of one dtype.
        row_len: tokens per row, `cell` times a power of two, or less than `cell`.
        pad_id: padding token.
        cell: tokens per cell.
        window: number of documents that are sorted, longest first, and packed together.

    Raises:
        UserError: `row_len` does not fit `cell`, see `check_row_len`.
    """
    packer = Packer(row_len, pad_id, cell, window)
    for name, tokens in documents:
        yield from packer.add(name, tokens)
    yield from packer.finish()


class Packer:
    """Incremental `pack`, one document at a time; it can be pickled between two documents and resumed.

    Arguments and errors are those of `pack`.
    """

    def __init__(self, row_len: int, pad_id: int, cell: int = CELL, window: int = WINDOW_DOCUMENTS):
        check_row_len(row_len, cell)
        self.row_len, self.pad_id, self.window = row_len, pad_id, window
        self._rows = _OpenRows(row_len, min(cell, row_len))
        self._pieces: list[_Piece] = []  # of the current window
        self._documents = self._tokens = 0  # in the current window

    def add(self, name: str, tokens: np.ndarray) -> list[PackedRow]:
        """Add a document and return the rows that are finished: none until the window is full."""
        for at in range(0, len(tokens), self.row_len):
            stop = at + self.row_len
            self._pieces.append(_Piece(name, at, tokens[at:stop], stop < len(tokens)))
        self._documents += 1
        self._tokens += len(tokens)
        full = self._documents == self.window or self._tokens >= WINDOW_TOKENS
        return self._pack_window(keep=CARRIED_ROWS) if full else []

    def finish(self) -> list[PackedRow]:
        """Return all rows that are still open, after the last document."""
        return self._pack_window(keep=0)

    def _pack_window(self, keep: int) -> list[PackedRow]:
        """Place the window's pieces, longest first, and return all rows but `keep`."""
        for piece in sorted(self._pieces, key=lambda piece: -len(piece.tokens)):
            self._rows.place(piece)
        self._pieces, self._documents, self._tokens = [], 0, 0
        return [_assemble(placed, self.row_len, self.pad_id) for placed in self._rows.close(keep)]


class _OpenRows:
    """Rows with room for more documents: a buddy allocator of cells, and best fit within partly filled cells."""

    def __init__(self, row_len: int, cell: int):
        self.row_len, self.cell, self.cells = row_len, cell, row_len // cell
        self.placed: dict[int, list[tuple[int, _Piece]]] = {}  # row: (first token, piece) of each
        self.created = 0
        self.gaps: list[tuple[int, int, int]] = []  # sorted (free tokens, row, end of the cell) of partly filled cells
        self.free: dict[int, list[tuple[int, int]]] = {}  # cells per block: heap of (row, first cell)

    def place(self, piece: _Piece) -> None:
        length = len(piece.tokens)
        fit = bisect_left(self.gaps, (length, -1, -1))  # gaps are shorter than a cell, so longer pieces find none
        if fit < len(self.gaps):
            room, row, cell_end = self.gaps.pop(fit)
            start = cell_end - room
        else:
            row, start = self._allocate(-(-length // self.cell))
        self.placed[row].append((start, piece))
        if room := -(start + length) % self.cell:
            insort(self.gaps, (room, row, start + length + room))

    def _allocate(self, cells: int) -> tuple[int, int]:
        """Allocate `cells` cells in the smallest free aligned block that fits; return row and first token."""
        size = 1 << (cells - 1).bit_length()
        while size <= self.cells and not self.free.get(size):
            size *= 2
        if size <= self.cells:
            row, first = heapq.heappop(self.free[size])
        else:
            row, first, size = self.created, 0, self.cells
            self.placed[row] = []
            self.created += 1
        unused = first + cells
        while unused < first + size:
            block = unused & -unused  # the largest block aligned there; it ends within the allocated block
            heapq.heappush(self.free.setdefault(block, []), (row, unused))
            unused += block
        return row, first * self.cell

    def close(self, keep: int) -> list[list[tuple[int, _Piece]]]:
        """Close and return all rows, oldest first, except the `keep` rows with the most room; no full row is kept."""
        room = {row: self.row_len - sum(len(p.tokens) for _, p in placed) for row, placed in self.placed.items()}
        kept = set(sorted((row for row in room if room[row]), key=lambda row: -room[row])[:keep])
        closed = [placed for row, placed in self.placed.items() if row not in kept]
        self.placed = {row: placed for row, placed in self.placed.items() if row in kept}
        self.gaps = [gap for gap in self.gaps if gap[1] in kept]
        self.free = {size: sorted(b for b in blocks if b[0] in kept) for size, blocks in self.free.items()}
        return closed


def _assemble(placed: list[tuple[int, _Piece]], row_len: int, pad_id: int) -> PackedRow:
    tokens = np.full(row_len, pad_id, dtype=placed[0][1].tokens.dtype)
    ends: list[int] = []
    spans: list[Span] = []
    end = 0
    for start, piece in sorted(placed, key=lambda item: item[0]):
        if start > end:
            ends.append(-start)
        end = start + len(piece.tokens)
        ends.append(end)
        tokens[start:end] = piece.tokens
        spans.append(Span(piece.id, start, len(piece.tokens), piece.offset, piece.continues))
    if end < row_len:
        ends.append(-row_len)
    return PackedRow(tokens, np.array(ends, dtype=np.int32), spans)
