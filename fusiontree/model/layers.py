"""Layers whose parameters keep their own precision: they are cast to the dtype of the input where they are used.

So the parameters of a training run stay fp32, and are its master weights, while activations are bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pointwise import norm


class Linear(nn.Linear):
    """A projection without bias in the dtype of its input; its weights start with deviation `std`."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.02):
        self.std = std  # before the parent's constructor, which starts the weights
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Vectors by token, which may be the head's too; they start with deviation `std`."""

    def __init__(self, tokens: int, size: int, std: float):
        self.std = std
        super().__init__(tokens, size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors anew."""
        nn.init.normal_(self.weight, std=self.std, generator=generator)

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """Tokens, int64 [...], to vectors [..., size]; as a head, vectors to logits [..., tokens] in their dtype."""
        return F.linear(x, self.weight.to(x.dtype)) if as_head else super().forward(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in the dtype of its input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start without scaling."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        return norm(x, self.weight, self.eps)
