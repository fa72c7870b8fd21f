"""Sampling of our own, because transformers sums probabilities in fp32, which misplaces top-p at large vocabularies.

Temperature, top-k, top-p, min-p and repetition penalty.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of likeliest tokens whose total probability reaches p
    min_p: float = 0.0  # drop tokens less likely than p times the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens already in the row become less likely (arXiv 1909.05858)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition-penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not valid:
                raise UserError(f"--{name} is {getattr(self, name.replace('-', '_'))}; it must be {rule}")


def draw(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token.

    Args:
        logits: [V].
        seen: bool [V], the tokens already in the row.

    Returns:
        int64 ().
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax()
    logits = logits.double() - logits.max()  # the greatest is 0: no temperature makes it infinite
    probabilities, order = candidates(logits / sampling.temperature, sampling)
    return order[torch.multinomial(probabilities, 1, generator=generator)[0]]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probabilities, likeliest first and 0 for excluded tokens, and the tokens in this order.

    The sums are fp64: over tens of thousands of tokens fp32 rounding would cut off top-p too early or too late.

    Args:
        logits: [V].
    """
    ordered, order = logits.double().sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    return probabilities * keep, order
