"""Nested packing: documents into rows, so that no curriculum stage of a cell or more cuts one that would have fitted.

A row is C cells of `cell` tokens, C a power of two. A document that needs c cells begins at a multiple of the next
power of two >= c, so slicing rows at any power-of-two number of cells cuts only documents longer than the slice.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fusiontree.errors import UserError

PACKER_VERSION = 1  # raised when the same documents would be packed otherwise
CELL = 4096  # tokens
WINDOW_DOCUMENTS = 10_000
WINDOW_TOKENS = 1 << 26  # bounds memory where documents are long
CARRIED_ROWS = 64  # rows left open from one window to the next


@dataclass(frozen=True)
class Span:
    """Where a document lies in its row; one longer than a row is cut into several spans, each in a row of its own."""

    id: str
    start: int  # its first token in the row
    length: int  # tokens
    offset: int  # tokens of the document that lie in other rows before this span; 0: the document begins here
    continues: bool = False  # the document goes on in another row


@dataclass(frozen=True)
class PackedRow:
    """One packed row."""

    tokens: np.ndarray  # [row_len]
    ends: np.ndarray  # int32 [segments], ascending in size: exclusive ends, negative where a stretch of padding ends
    spans: list[Span]  # in the order of the row


@dataclass(frozen=True)
class _Piece:
    id: str
    offset: int
    tokens: np.ndarray
    continues: bool


def check_row_len(row_len: int, cell: int = CELL) -> None:
    """Raise UserError unless a row can be halved down to cells, or is no longer than one."""
    cells = row_len // cell
    if row_len < 2 or (row_len > cell and (row_len % cell or cells & (cells - 1))):
        raise UserError(f"row length {row_len} is neither {cell} times a power of two nor from 2 to {cell}; use one")


def pack(
    documents: Iterable[tuple[str, np.ndarray]],
    row_len: int,
    pad_id: int,
    cell: int = CELL,
    window: int = WINDOW_DOCUMENTS,
) -> Iterator[PackedRow]:
    """Pack a stream of documents; the same stream gives the same rows.

    Args:
        documents: (id, tokens [n]) with n >= 1, the end-of-document token included, all of one dtype.
        row_len: tokens per row, `cell` times a power of two, or less than `cell`.
        pad_id: the token that fills what stays empty.
        cell: tokens per cell.
        window: documents that are sorted, longest first, and packed together.

    Raises:
        UserError: `row_len` does not suit `cell`.
    """
    packer = Packer(row_len, pad_id, cell, window)
    for name, tokens in documents:
        yield from packer.add(name, tokens)
    yield from packer.finish()


class Packer:
    """What `pack` does, a document at a time. It can be pickled between two documents and goes on from there.

    Args and errors are those of `pack`.
    """

    def __init__(self, row_len: int, pad_id: int, cell: int = CELL, window: int = WINDOW_DOCUMENTS):
        check_row_len(row_len, cell)
        self.row_len, self.pad_id, self.window = row_len, pad_id, window
        self._rows = _OpenRows(row_len, min(cell, row_len))
        self._pieces: list[_Piece] = []  # of the window that fills
        self._documents = self._tokens = 0  # in it

    def add(self, name: str, tokens: np.ndarray) -> list[PackedRow]:
        """Take a document in; returns the rows that are finished, none until the window is full."""
        for at in range(0, len(tokens), self.row_len):
            stop = at + self.row_len
            self._pieces.append(_Piece(name, at, tokens[at:stop], stop < len(tokens)))
        self._documents += 1
        self._tokens += len(tokens)
        full = self._documents == self.window or self._tokens >= WINDOW_TOKENS
        return self._pack_window(keep=CARRIED_ROWS) if full else []

    def finish(self) -> list[PackedRow]:
        """All rows that are still open, after the last document."""
        return self._pack_window(keep=0)

    def _pack_window(self, keep: int) -> list[PackedRow]:
        """Place the window's documents, those longer than a row cut, and hand over all rows but `keep`."""
        for piece in sorted(self._pieces, key=lambda piece: -len(piece.tokens)):
            self._rows.place(piece)
        self._pieces, self._documents, self._tokens = [], 0, 0
        return [_assemble(placed, self.row_len, self.pad_id) for placed in self._rows.close(keep)]


class _OpenRows:
    """Rows that still take documents: a buddy allocator of cells, and best-fit in the cells begun."""

    def __init__(self, row_len: int, cell: int):
        self.row_len, self.cell, self.cells = row_len, cell, row_len // cell
        self.placed: dict[int, list[tuple[int, _Piece]]] = {}  # by row: (first token, piece)
        self.created = 0
        self.gaps: list[tuple[int, int, int]] = []  # sorted (tokens free, row, end of the cell), of the cells begun
        self.free: dict[int, list[tuple[int, int]]] = {}  # by cells in the block: heap of (row, first cell)

    def place(self, piece: _Piece) -> None:
        length = len(piece.tokens)
        fit = bisect_left(self.gaps, (length, -1, -1))  # never one for a piece longer than a cell
        if fit < len(self.gaps):
            room, row, cell_end = self.gaps.pop(fit)
            start = cell_end - room
        else:
            row, start = self._take(-(-length // self.cell))
        self.placed[row].append((start, piece))
        if room := -(start + length) % self.cell:
            insort(self.gaps, (room, row, start + length + room))

    def _take(self, cells: int) -> tuple[int, int]:
        """Row and first token of `cells` unused cells in an aligned block, the smallest that holds them."""
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
            block = unused & -unused  # the largest block aligned there; it ends inside the one taken
            heapq.heappush(self.free.setdefault(block, []), (row, unused))
            unused += block
        return row, first * self.cell

    def close(self, keep: int) -> list[list[tuple[int, _Piece]]]:
        """Hand over all rows, oldest first, but the `keep` with the most room (full ones never stay)."""
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
