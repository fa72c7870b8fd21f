"""The order of training as a function of (seed, index): nothing to store, nothing to replay on resume.

A training row is a slice of a packed row. Each epoch permutes the packed rows, then the slices inside consecutive
windows of the permuted rows: thorough mixing, while a packed row's slices stay near enough to be read once.
"""

import hashlib

WINDOW_SLICES = 4096
_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class RowOrder:
    """Where the training rows lie.

    Args:
        num_rows: packed rows.
        slices_per_row: training rows per packed row.
        seed: chooses the order.
    """

    def __init__(self, num_rows: int, slices_per_row: int, seed: int):
        assert num_rows > 0, "no rows to order"
        assert slices_per_row > 0, "no slices in a row"
        self.num_rows, self.slices_per_row, self.seed = num_rows, slices_per_row, seed
        self.window_rows = max(1, WINDOW_SLICES // slices_per_row)

    def locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, packed row, slice) of global training row `index` >= 0."""
        assert index >= 0, index
        epoch, place = divmod(index, self.num_rows * self.slices_per_row)
        window, inside = divmod(place, self.window_rows * self.slices_per_row)
        first = window * self.window_rows
        slices = min(self.window_rows, self.num_rows - first) * self.slices_per_row
        row, part = divmod(permute(inside, slices, self._key(epoch, window)), self.slices_per_row)
        return epoch, permute(first + row, self.num_rows, self._key(epoch, "rows")), part

    def _key(self, epoch: int, what: int | str) -> int:
        text = f"{self.seed}/{epoch}/{what}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under the pseudo-random permutation of range(size) that the 64-bit `key` chooses.

    A Feistel network permutes the next power of four; walking on from an image outside the range keeps it a bijection.
    """
    assert 0 <= index < size, (index, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + right * _ROUNDS + turn) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
