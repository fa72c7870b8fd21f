"""Segment ends of a row, as in the format: exclusive ends, ascending in absolute value; a negative end closes padding.

Every reader of a row's ends uses these functions, so that all of them treat padding alike: wherever it is in the row,
it is no document, and its tokens are never text.
"""

import itertools

import numpy as np

ENDS = np.dtype("<i4")


def stops(ends: np.ndarray) -> np.ndarray:
    """Return the exclusive end of each segment, padding included: the dtype of `ends`, [segments]."""
    return np.abs(ends)


def is_padding(ends: np.ndarray) -> np.ndarray:
    """Return whether each segment is padding: bool [segments]."""
    return ends < 0


def count_tokens(ends: np.ndarray) -> int:
    """Return the number of tokens that are not padding."""
    limits = stops(ends)
    count = int(limits[-1])
    for segment in is_padding(ends).nonzero()[0].tolist():
        count -= int(limits[segment]) - (int(limits[segment - 1]) if segment else 0)
    return count


def documents(tokens: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Return the tokens of each document of a row, without padding, as views of `tokens`."""
    limits = itertools.pairwise([0, *stops(ends).tolist()])
    return [
        tokens[start:stop] for (start, stop), empty in zip(limits, is_padding(ends).tolist(), strict=True) if not empty
    ]


def only_padding(length: int) -> np.ndarray:
    """Return the ends of a row of `length` tokens of padding: int32 [1]."""
    return np.array([-length], dtype=ENDS)


def without_fill(ends: np.ndarray) -> np.ndarray:
    """Return the ends of a row of ``KEY.ends.npy``, whose rows are filled up with 0."""
    return ends[: np.count_nonzero(ends)]


def find_fault(ends: np.ndarray, row_len: int) -> str:
    """Return the fault of a row's ends, "" if they are valid: they ascend strictly, from above 0 to `row_len`."""
    if len(ends):
        limits = stops(ends)  # the smallest int32 stays negative, and so never ascends
        if limits[-1] == row_len and limits[0] > 0 and (limits[1:] > limits[:-1]).all():
            return ""
    return f"segment ends do not ascend to the row's length {row_len}"


def cut(ends: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Split the ends of a packed row into those of its slices, counted from each slice's start.

    Args:
        ends: int32 [segments] of the packed row.
        seq_len: tokens per slice; divides the row length.
    """
    limits = stops(ends)
    if limits[-1] == seq_len:
        return [ends]
    slices = np.arange(seq_len, limits[-1] + 1, seq_len, dtype=ends.dtype)
    cuts = np.sort(np.concatenate([limits, slices]))
    cuts = cuts[np.diff(cuts, prepend=0) > 0]  # a segment and a slice that end together give one cut
    signed = np.sign(ends)[limits.searchsorted(cuts)] * ((cuts - 1) % seq_len + 1)
    at = [0, *(cuts.searchsorted(slices) + 1).tolist()]
    return [signed[first:last] for first, last in itertools.pairwise(at)]
