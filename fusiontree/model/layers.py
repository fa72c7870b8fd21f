"""Layers that cast their parameters to the dtype of the input.

In training the parameters stay fp32 and are the master weights, while activations are bf16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pointwise import norm


class Linear(nn.Linear):
    """Linear projection without bias, in the dtype of its input; weights are initialized from N(0, std²)."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.02):
        self.std = std  # set first: the parent's constructor calls reset_parameters
        self.product: Callable[[Tensor, Tensor], Tensor] | None = None  # of input and weight, instead of torch's
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the weights from N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., inputs] to [..., outputs]."""
        if self.product is not None:
            return self.product(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """Token embedding, which may also serve as the head; vectors are initialized from N(0, std²)."""

    def __init__(self, tokens: int, size: int, std: float):
        self.std = std
        super().__init__(tokens, size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the vectors from N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std, generator=generator)

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """Map tokens, int64 [...], to vectors [..., size]; as a head, map vectors to logits [..., tokens]."""
        return F.linear(x, self.weight.to(x.dtype)) if as_head else super().forward(x)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis (arXiv 1910.07467), in the dtype of its input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input; shapes [..., size]."""
        return norm(x, self.weight, self.eps)
