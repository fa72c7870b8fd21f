"""Layers whose parameters keep their own precision: they are cast to the dtype of the input where they are used.

So the parameters of a training run stay fp32, and are its master weights, while activations are bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pointwise import norm


class Linear(nn.Linear):
    """A projection without bias in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in the dtype of its input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        return norm(x, self.weight, self.eps)
