"""How several sources share the packed rows: exact counts by error diffusion, each in O(1) of the row's number."""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class SourceRows:
    """What a mixture knows of a source."""

    name: str  # "" for a source that stands alone: the run names a path and no sources
    rows: int  # packed rows of one epoch
    max_epochs: Fraction | None = None  # after so many the source gives no more; None: it repeats for ever

    @property
    def limit(self) -> int | None:
        """Packed rows that it gives at most."""
        return None if self.max_epochs is None else int(self.rows * self.max_epochs)


@dataclass(frozen=True)
class Phase:
    """A stretch of packed rows that is mixed by the same weights."""

    first: int  # number of its first packed row
    given: tuple[int, ...]  # packed rows that each source gave before it
    weights: tuple[Fraction, ...]  # share of each source, 0 for one that is used up; their sum is 1


class Mixture:
    """Which source gives the k-th packed row, and its how many-th row that is.

    After any number of rows of a phase each source has given its share to within two rows: the sources are the leaves
    of a Huffman tree of their shares, and every inner node divides its rows between its two children by rounding, so
    an error of at most one half is passed down, scaled by a share of at most two thirds, and one half is added.

    A source that has reached its cap leaves the mixture; the others take over its share in proportion to theirs.

    Args:
        sources: at least one.
        table: (first packed row, weight of each source) from that row on; ascending, the first at 0. Weights are at
            least 0 and need not add up to 1.
    """

    def __init__(self, sources: Sequence[SourceRows], table: Sequence[tuple[int, Sequence[Fraction]]]):
        assert sources, "no sources to mix"
        assert all(source.rows > 0 for source in sources), "a source has no rows"
        assert table[0][0] == 0, "no weights for the first row"
        self.sources = tuple(sources)
        self.phases: list[Phase] = []
        self.end: int | None = None  # packed rows until no source with a share is left; None: never
        self._trees: list[_Tree] = []
        for i, (first, weights) in enumerate(table):
            following = table[i + 1][0] if i + 1 < len(table) else None
            self._add_phases(first, following, weights)
            if self.end is not None:
                break
        self._firsts = [phase.first for phase in self.phases]

    def _add_phases(self, first: int, following: int | None, weights: Sequence[Fraction]) -> None:
        """Mix by `weights` up to row `following`; each source that is used up on the way begins another phase."""
        while True:
            given = tuple(self._counts(first)) if self.phases else (0,) * len(self.sources)
            open_weights = [
                Fraction(0) if source.limit is not None and count >= source.limit else Fraction(weight)
                for source, count, weight in zip(self.sources, given, weights, strict=True)
            ]
            if not (total := sum(open_weights)):
                self.end = first
                return
            phase = Phase(first, given, tuple(weight / total for weight in open_weights))
            self.phases.append(phase)
            self._trees.append(_Tree(phase.weights))
            used_up = self._first_used_up(phase, following)
            if used_up is None or used_up == following:
                return
            first = used_up

    def _first_used_up(self, phase: Phase, following: int | None) -> int | None:
        """The first row number, up to `following`, before which a source of the phase has given its last row."""
        ends = [following] if following is not None else []
        for i, (source, weight) in enumerate(zip(self.sources, phase.weights, strict=True)):
            if source.limit is not None and weight:
                left = source.limit - phase.given[i]
                low, high = phase.first, phase.first + int((left + 2) / weight) + 1
                while high - low > 1:  # the smallest number of rows after which `left` are given
                    middle = (low + high) // 2
                    low, high = (low, middle) if self._counts(middle)[i] >= source.limit else (middle, high)
                ends.append(high)
        return min(ends, default=None)

    def counts(self, rows: int) -> list[int]:
        """Packed rows that each source gives among the first `rows`, at most `end`."""
        assert self.end is None or rows <= self.end, (rows, self.end)
        return self._counts(rows, bisect_right(self._firsts, rows) - 1)

    def _counts(self, rows: int, phase: int = -1) -> list[int]:
        given = self.phases[phase].given
        shares = self._trees[phase].counts(rows - self.phases[phase].first)
        return [before + share for before, share in zip(given, shares, strict=True)]

    def locate(self, row: int) -> tuple[int, int]:
        """The source that gives packed row `row`, below `end`, by its place, and how many rows it gave before."""
        assert self.end is None or row < self.end, (row, self.end)
        number = bisect_right(self._firsts, row) - 1
        phase = self.phases[number]
        source, ordinal = self._trees[number].locate(row - phase.first)
        return source, phase.given[source] + ordinal


class _Tree:
    """A Huffman tree of shares; row k of a node goes left when the rounded share of the left child grows with it."""

    def __init__(self, weights: Sequence[Fraction]):
        self.size = len(weights)
        heap = [(weight, i) for i, weight in enumerate(weights) if weight]
        nodes: dict[int, tuple[int, int, int, int]] = {}  # by number: left and right child, left share as a/b
        heapq.heapify(heap)
        made = self.size
        while len(heap) > 1:
            (right_weight, right), (left_weight, left) = heapq.heappop(heap), heapq.heappop(heap)
            share = left_weight / (left_weight + right_weight)
            nodes[made] = (left, right, share.numerator, share.denominator)
            heapq.heappush(heap, (left_weight + right_weight, made))
            made += 1
        self.nodes, self.root = nodes, heap[0][1]

    def counts(self, rows: int) -> list[int]:
        """Rows of each leaf among the first `rows`."""
        found = [0] * self.size
        pending = [(self.root, rows)]
        while pending:
            number, count = pending.pop()
            if number < self.size:
                found[number] = count
                continue
            left, right, a, b = self.nodes[number]
            to_left = _rounded(count * a, b)
            pending += [(left, to_left), (right, count - to_left)]
        return found

    def locate(self, row: int) -> tuple[int, int]:
        """The leaf that row number `row` goes to, and how many went there before."""
        number = self.root
        while number >= self.size:
            left, right, a, b = self.nodes[number]
            to_left = _rounded(row * a, b)
            if _rounded((row + 1) * a, b) > to_left:
                number, row = left, to_left
            else:
                number, row = right, row - to_left
        return number, row


def _rounded(numerator: int, denominator: int) -> int:
    """The integer nearest to a fraction that is not negative, halves up; exact for integers of any size."""
    return (2 * numerator + denominator) // (2 * denominator)
