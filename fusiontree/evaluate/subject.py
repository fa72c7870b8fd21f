"""The subject of an evaluation: a model, its tokenizer, and a dataset with its n-gram counts."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusiontree.data import segments
from fusiontree.data.format import Dataset
from fusiontree.data.sources import Sources, held_out_sources
from fusiontree.errors import UserError, short_cause
from fusiontree.evaluate.ngram import Bigram
from fusiontree.evaluate.options import EvalOptions
from fusiontree.inference.loading import check_ids, check_positions, encode, load_export, read_facts
from fusiontree.model.lm import HybridLM

_COUNTED_TOKENS = 2**22  # training tokens counted for the n-gram baselines
_TEXT_ROWS = 64  # held-out rows that haystacks and prompts are cut from


@dataclass(frozen=True)
class Subject:
    """An exported model and the data of its evaluation."""

    model: HybridLM
    tokenizer: Tokenizer
    facts: dict[str, Any]  # as returned by `read_facts`
    folder: Path  # of the export
    train: Dataset  # training split
    lengths: tuple[int, ...]  # prompt lengths, tokens
    seq_len: int  # tokens per row of perplexity
    limit: int | None  # maximum number of held-out rows
    samples: int  # prompts per cell of a retrieval task

    @classmethod
    def load(cls, folder: Path, options: EvalOptions, new_tokens: int = 0) -> "Subject":
        """Load the export at `folder` and open the data.

        Args:
            new_tokens: maximum number of tokens generated after a prompt.

        Raises:
            UserError: no export, no dataset, a dataset built with another tokenizer or with tokens outside the model's
                vocabulary, or lengths beyond the time encoding.
        """
        facts, train = read_facts(folder), Dataset(options.data, "train")
        train.manifest.require_tokenizer(facts["tokenizer_fingerprint"], folder)
        model, tokenizer = load_export(folder)
        lengths, seq_len = options.lengths or (facts["seq_len"],), options.seq_len or facts["seq_len"]
        check_positions(model.config, max(max(lengths) + new_tokens, seq_len))
        last, largest = model.config.vocab_size - 1, train.manifest.vocab_size - 1
        if largest > last:
            raise UserError(
                f"{options.data} has token ids up to {largest}, but the model's largest is {last}; "
                "build the dataset with the model's tokenizer"
            )
        return cls(model, tokenizer, facts, folder, train, lengths, seq_len, options.limit, options.samples)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the dataset."""
        return self.train.manifest.vocab_size

    @property
    def chance_loss(self) -> float:
        """Loss of a uniform guess over the model's vocabulary, nats per token."""
        return math.log(self.model.config.vocab_size)

    @cached_property
    def bigram(self) -> Bigram:
        """Counts over the first rows of the training split.

        Raises:
            UserError: these rows have no pair of tokens. RunError: one is damaged.
        """
        count = min(self.train.num_rows, max(1, _COUNTED_TOKENS // self.train.manifest.row_len))
        rows = [self.train.row(row) for row in range(count)]
        try:
            return Bigram.count(rows, self.vocab_size)
        except ValueError as error:
            raise UserError(
                f"{self.train.location}: the first {count} training rows give no n-gram baseline "
                f"({short_cause(error)}); build the dataset from longer documents"
            ) from None

    @cached_property
    def held_out(self) -> Sources:
        """Held-out rows of the dataset; errors as in `held_out_sources`."""
        return held_out_sources({"": Dataset(self.train.location, "validation")})

    @cached_property
    def text(self) -> np.ndarray:
        """Concatenated documents of held-out rows as token ids, int64, repeated to more than the longest prompt.

        Raises:
            RunError: a row is damaged.
        """
        (held_out,) = self.held_out.datasets
        rows = np.flatnonzero(held_out.valid_tokens)[:_TEXT_ROWS].tolist()
        joined = np.concatenate([document for row in rows for document in segments.documents(*held_out.row(row))])
        return np.tile(joined.astype(np.int64), -(-(max(self.lengths) + 1) // len(joined)))

    def ids(self, text: str) -> list[int]:
        """Encode `text` with the model's tokenizer.

        Raises:
            UserError: `text` has no token, or one outside the model's vocabulary.
        """
        ids = encode(self.tokenizer, text)
        check_ids(self.model.config, {f"{text!r} by {self.folder}'s tokenizer": ids})
        return ids
