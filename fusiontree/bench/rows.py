"""Synthetic packed rows: random tokens in documents of random lengths. Free of torch."""

from typing import Literal

import numpy as np

from fusiontree.data.batch import Batch, collate

Documents = Literal["packed", "single"]

# document lengths are log-normal: mean 2,104 tokens, one in 500 longer than 32,768
MEDIAN_TOKENS = 1024
SIGMA = 1.2  # standard deviation of the logarithm


def document_lengths(kind: Documents, seq_len: int, draw: np.random.Generator) -> list[int]:
    """Return document lengths that fill a row of `seq_len` tokens; the last document is cut to fit."""
    if kind == "single":
        return [seq_len]
    lengths: list[int] = []
    left = seq_len
    while left:
        lengths.append(min(left, max(1, round(draw.lognormal(np.log(MEDIAN_TOKENS), SIGMA)))))
        left -= lengths[-1]
    return lengths


def synthetic_batch(kind: Documents, rows: int, seq_len: int, vocab_size: int, seed: tuple[int, ...]) -> Batch:
    """Return a batch of random tokens, deterministic in `seed`."""
    draw = np.random.default_rng(seed)
    ends = [np.cumsum(document_lengths(kind, seq_len, draw), dtype=np.int32) for _ in range(rows)]
    return collate(draw.integers(vocab_size, size=(rows, seq_len)), ends)
