"""What counting words would give: unigrams and bigrams of the training rows, the baseline of every task."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bigram:
    """Counts of tokens and of pairs of neighbours inside documents."""

    vocab_size: int
    counts: np.ndarray  # int64 [vocabulary]
    pairs: np.ndarray  # int64 [pairs], before · vocabulary + after, sorted
    pair_counts: np.ndarray  # int64 [pairs]

    @classmethod
    def count(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> "Bigram":
        """Count packed rows: token ids and where documents end."""
        counts, codes = np.zeros(vocab_size, dtype=np.int64), []
        for tokens, ends in rows:
            start = 0
            for end in ends.tolist():
                document = tokens[start:end].astype(np.int64)
                counts += np.bincount(document, minlength=vocab_size)
                codes.append(document[:-1] * vocab_size + document[1:])
                start = end
        pairs, pair_counts = np.unique(np.concatenate(codes), return_counts=True)
        return cls(vocab_size, counts, pairs, pair_counts)

    def unigram_losses(self, after: np.ndarray) -> np.ndarray:
        """Nats of each token, counts raised by one."""
        total = self.counts.sum() + self.vocab_size
        return np.log(total) - np.log(self.counts[after] + 1)

    def losses(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Nats of each token behind the one before it, smoothed with the unigrams as Witten and Bell do (1991)."""
        codes = before * self.vocab_size + after
        place = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == codes, self.pair_counts[place], 0)
        first = np.searchsorted(self.pairs, before * self.vocab_size)
        kinds = np.searchsorted(self.pairs, (before + 1) * self.vocab_size) - first
        sums = np.concatenate([[0], np.cumsum(self.pair_counts)])
        total = sums[first + kinds] - sums[first]
        unigram = np.exp(-self.unigram_losses(after))
        smoothed = (seen + kinds * unigram) / np.maximum(total + kinds, 1)
        return -np.log(np.where(total > 0, smoothed, unigram))

    def likeliest(self, before: int) -> int:
        """The token most often seen behind `before`; the commonest of all where there is none."""
        first, end = np.searchsorted(self.pairs, [before * self.vocab_size, (before + 1) * self.vocab_size])
        if first == end:
            return int(self.counts.argmax())
        return int(self.pairs[first + self.pair_counts[first:end].argmax()] % self.vocab_size)
