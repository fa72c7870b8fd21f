"""Mixture of several sources: exact row counts by error diffusion, in time independent of the row's number."""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class SourceRows:
    """The size and cap of a source."""

    name: str  # "" for the single unnamed source of a run with data.path
    rows: int  # packed rows per epoch
    max_epochs: Fraction | None = None  # cap; None: the source repeats without end

    @property
    def limit(self) -> int | None:
        """Maximum number of packed rows; None: no limit."""
        return None if self.max_epochs is None else int(self.rows * self.max_epochs)


@dataclass(frozen=True)
class Phase:
    """A range of packed rows with constant weights."""

    first: int  # first packed row
    rows_before: tuple[int, ...]  # packed rows of each source before this phase
    weights: tuple[Fraction, ...]  # share of each source, 0 once it is used up; the sum is 1


class Mixture:
    """A map from global row k to (source, index within that source).

    After any number of rows of a phase, the count of each source differs from its share by less than two rows. The
    sources are the leaves of a Huffman tree of their shares, and every inner node splits its rows between its two
    children by rounding. A child's error is therefore at most its parent's error times the child's share, plus one
    half. The share of a child that is an inner node is at most two thirds, which bounds the sum.

    A source that has reached its cap leaves the mixture; the others take over its share in proportion to theirs.

    Args:
        sources: at least one.
        table: (first packed row, weight of each source), ascending, the first at row 0. Weights are at least 0 and
            need not sum to 1.
    """

    def __init__(self, sources: Sequence[SourceRows], table: Sequence[tuple[int, Sequence[Fraction]]]):
        assert sources, "no sources to mix"
        assert all(source.rows > 0 for source in sources), "a source has no rows"
        assert table[0][0] == 0, "no weights for the first row"
        self.sources = tuple(sources)
        self.phases: list[Phase] = []
        self.end: int | None = None  # packed rows until every source with a weight is used up; None: never
        self._trees: list[_Tree] = []
        for i, (first, weights) in enumerate(table):
            following = table[i + 1][0] if i + 1 < len(table) else None
            self._add_phases(first, following, weights)
            if self.end is not None:
                break
        self._firsts = [phase.first for phase in self.phases]

    def _add_phases(self, first: int, following: int | None, weights: Sequence[Fraction]) -> None:
        """Append the phases that mix by `weights` up to row `following`: each used-up source begins another phase."""
        while True:
            counts = tuple(self._counts(first)) if self.phases else (0,) * len(self.sources)
            open_weights = [
                Fraction(0) if source.limit is not None and count >= source.limit else Fraction(weight)
                for source, count, weight in zip(self.sources, counts, weights, strict=True)
            ]
            if not (total := sum(open_weights)):
                self.end = first
                return
            phase = Phase(first, counts, tuple(weight / total for weight in open_weights))
            self.phases.append(phase)
            self._trees.append(_Tree(phase.weights))
            end = self._phase_end(phase, following)
            if end is None or end == following:
                return
            first = end

    def _phase_end(self, phase: Phase, following: int | None) -> int | None:
        """Return the row at which the phase ends: a source is used up, or row `following`. None: never."""
        ends = [following] if following is not None else []
        for i, (source, weight) in enumerate(zip(self.sources, phase.weights, strict=True)):
            if source.limit is not None and weight:
                remaining = source.limit - phase.rows_before[i]
                low, high = phase.first, phase.first + int((remaining + 2) / weight) + 1
                while high - low > 1:  # bisect for the smallest number of rows that uses up the source
                    middle = (low + high) // 2
                    low, high = (low, middle) if self._counts(middle)[i] >= source.limit else (middle, high)
                ends.append(high)
        return min(ends, default=None)

    def counts(self, rows: int) -> list[int]:
        """Count the packed rows of each source among the first `rows` (at most `end`)."""
        assert self.end is None or rows <= self.end, (rows, self.end)
        return self._counts(rows, bisect_right(self._firsts, rows) - 1)

    def _counts(self, rows: int, phase: int = -1) -> list[int]:
        before = self.phases[phase].rows_before
        within = self._trees[phase].counts(rows - self.phases[phase].first)
        return [earlier + count for earlier, count in zip(before, within, strict=True)]

    def locate(self, row: int) -> tuple[int, int]:
        """Map packed row `row`, below `end`, to (source index, row index within that source)."""
        assert self.end is None or row < self.end, (row, self.end)
        number = bisect_right(self._firsts, row) - 1
        phase = self.phases[number]
        source, index = self._trees[number].locate(row - phase.first)
        return source, phase.rows_before[source] + index


class _Tree:
    """A Huffman tree of shares; row k of a node goes left if the left child's rounded count grows at k."""

    def __init__(self, weights: Sequence[Fraction]):
        self.size = len(weights)
        heap = [(weight, i) for i, weight in enumerate(weights) if weight]
        nodes: dict[int, tuple[int, int, int, int]] = {}  # number: (left child, right child, left share as a, b of a/b)
        heapq.heapify(heap)
        node = self.size
        while len(heap) > 1:
            (right_weight, right), (left_weight, left) = heapq.heappop(heap), heapq.heappop(heap)
            share = left_weight / (left_weight + right_weight)
            nodes[node] = (left, right, share.numerator, share.denominator)
            heapq.heappush(heap, (left_weight + right_weight, node))
            node += 1
        self.nodes, self.root = nodes, heap[0][1]

    def counts(self, rows: int) -> list[int]:
        """Count the rows of each leaf among the first `rows`."""
        found = [0] * self.size
        pending = [(self.root, rows)]
        while pending:
            number, count = pending.pop()
            if number < self.size:
                found[number] = count
                continue
            left, right, a, b = self.nodes[number]
            to_left = _round_half_up(count * a, b)
            pending += [(left, to_left), (right, count - to_left)]
        return found

    def locate(self, row: int) -> tuple[int, int]:
        """Map row number `row` to (leaf, row index within that leaf)."""
        number = self.root
        while number >= self.size:
            left, right, a, b = self.nodes[number]
            to_left = _round_half_up(row * a, b)
            if _round_half_up((row + 1) * a, b) > to_left:
                number, row = left, to_left
            else:
                number, row = right, row - to_left
        return number, row


def _round_half_up(numerator: int, denominator: int) -> int:
    """Round a nonnegative fraction to the nearest integer, halves up; exact for integers of any size."""
    return (2 * numerator + denominator) // (2 * denominator)
