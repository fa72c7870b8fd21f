"""Layers whose parameters keep their own precision: they are cast to the dtype of the input where they are used.

So the parameters of a training run stay fp32, and are its master weights, while activations are bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Gated MLP, ``W_down(silu(W_gate·x) ⊙ W_up·x)`` (arXiv 2002.05202)."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_up = Linear(size, 2 * inner)
        self.down = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
