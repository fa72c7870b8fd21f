"""What the tasks are given: the model, its tokenizer, and the data with its n-gram counts."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusiontree.data.format import Dataset
from fusiontree.data.sources import Sources, open_held_out
from fusiontree.errors import UserError
from fusiontree.evaluate.ngram import Bigram
from fusiontree.inference.generate import check_ids
from fusiontree.inference.loading import check_positions, load_export, read_facts
from fusiontree.model.lm import HybridLM

_COUNTED_TOKENS = 2**22  # of the training rows, for the n-gram baseline


@dataclass(frozen=True)
class Subject:
    """An exported model and all that its evaluation reads."""

    model: HybridLM
    tokenizer: Tokenizer
    facts: dict[str, Any]
    folder: Path  # the export's
    train: Dataset
    lengths: tuple[int, ...]  # tokens of prompts
    seq_len: int  # tokens of a row of the perplexity
    limit: int | None  # rows at most
    samples: int  # prompts of each kind

    @classmethod
    def load(
        cls,
        folder: Path,
        data: Path,
        lengths: tuple[int, ...],
        behind: int,
        seq_len: int | None,
        limit: int | None,
        samples: int,
    ) -> "Subject":
        """Load the export and open the data.

        Args:
            behind: tokens that are made behind prompts of `lengths`, at most.

        Raises:
            UserError: no export, no dataset, another tokenizer, tokens that the model does not know, or lengths beyond
                the time encoding.
        """
        facts, train = read_facts(folder), Dataset(data, "train")
        train.manifest.require_tokenizer(facts["tokenizer_fingerprint"], folder)
        model, tokenizer = load_export(folder)
        lengths, seq_len = lengths or (facts["seq_len"],), seq_len or facts["seq_len"]
        check_positions(model.config, max(max(lengths) + behind, seq_len))
        if train.manifest.vocab_size > model.config.vocab_size:
            last = model.config.vocab_size - 1
            raise UserError(f"{data} holds tokens up to {train.manifest.vocab_size - 1}; the model's end at {last}")
        return cls(model, tokenizer, facts, folder, train, lengths, seq_len, limit, samples)

    @property
    def vocab_size(self) -> int:
        """Tokens that the data can hold."""
        return self.train.manifest.vocab_size

    @property
    def chance_loss(self) -> float:
        """Nats of a token by a uniform guess among all that the model knows."""
        return math.log(self.model.config.vocab_size)

    @cached_property
    def bigram(self) -> Bigram:
        """Counted over the first rows of the training split."""
        rows = min(self.train.num_rows, max(1, _COUNTED_TOKENS // self.train.manifest.row_len))
        return Bigram.count((self.train.row(row) for row in range(rows)), self.vocab_size)

    @cached_property
    def held_out(self) -> Sources:
        """The dataset's held-out rows; errors as in `open_held_out`."""
        return open_held_out({"": self.train.location})

    @cached_property
    def text(self) -> np.ndarray:
        """Token ids of held-out text, end to end, at least as many as the longest prompt."""
        (held_out,) = self.held_out.datasets
        rows = [_real_tokens(held_out, row) for row in range(min(held_out.num_rows, 64))]
        joined = np.concatenate(rows)
        return np.tile(joined, -(-(max(self.lengths) + 1) // len(joined)))

    def ids(self, text: str) -> list[int]:
        """`text`, not empty, by the model's own tokenizer."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        check_ids(self.model.config, {f"{text!r} by {self.folder}'s tokenizer": ids})
        return ids


def _real_tokens(dataset: Dataset, row: int) -> np.ndarray:
    tokens, ends = dataset.row(row)
    return np.asarray(tokens[: ends[-1]], dtype=np.int64)
