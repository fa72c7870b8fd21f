"""Unigram and bigram counts of the training rows, the baseline of every task."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusiontree.data import segments


@dataclass(frozen=True)
class Bigram:
    """Counts of tokens and of adjacent token pairs within documents."""

    vocab_size: int
    counts: np.ndarray  # int64 [vocabulary]
    pairs: np.ndarray  # int64 [pairs], before · vocabulary + after, sorted
    pair_counts: np.ndarray  # int64 [pairs]

    @classmethod
    def count(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> "Bigram":
        """Count the documents of packed rows, each given as token ids and segment ends as in the shard format.

        Raises:
            ValueError: no document has two tokens.
        """
        counts, keys = np.zeros(vocab_size, dtype=np.int64), []
        for tokens, ends in rows:
            for document in segments.documents(tokens.astype(np.int64), ends):
                counts += np.bincount(document, minlength=vocab_size)
                keys.append(document[:-1] * vocab_size + document[1:])
        if not any(map(len, keys)):
            raise ValueError("no document has two tokens")
        pairs, pair_counts = np.unique(np.concatenate(keys), return_counts=True)
        return cls(vocab_size, counts, pairs, pair_counts)

    def unigram_losses(self, after: np.ndarray) -> np.ndarray:
        """Return the add-one smoothed unigram loss of each token, nats."""
        total = self.counts.sum() + self.vocab_size
        return np.log(total) - np.log(self.counts[after] + 1)

    def losses(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return the loss of each token `after` given the token `before` it, nats, Witten-Bell smoothed (1991)."""
        keys = before * self.vocab_size + after
        index = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        seen = np.where(self.pairs[index] == keys, self.pair_counts[index], 0)
        first = np.searchsorted(self.pairs, before * self.vocab_size)
        followers = np.searchsorted(self.pairs, (before + 1) * self.vocab_size) - first
        sums = np.concatenate([[0], np.cumsum(self.pair_counts)])
        total = sums[first + followers] - sums[first]
        unigram = np.exp(-self.unigram_losses(after))
        smoothed = (seen + followers * unigram) / np.maximum(total + followers, 1)
        return -np.log(np.where(total > 0, smoothed, unigram))

    def likeliest(self, before: int) -> int:
        """Return the most frequent token after `before`, or the most frequent of all if `before` has no follower."""
        first, end = np.searchsorted(self.pairs, [before * self.vocab_size, (before + 1) * self.vocab_size])
        if first == end:
            return int(self.counts.argmax())
        return int(self.pairs[first + self.pair_counts[first:end].argmax()] % self.vocab_size)
