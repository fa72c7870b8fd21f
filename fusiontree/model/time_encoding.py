"""Shared relative time encoding (SRTE): where in its document a token stands, for the Mamba branch."""

import torch
from torch import Tensor, nn

from .config import ModelConfig


class SincosTimeEncoding(nn.Module):
    """Sines and cosines of the position at geometric wavelengths from 2π to 10,000·2π (arXiv 1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.frequencies = config.hidden_size // 2

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [B, L] to `dtype` [B, L, hidden_size]."""
        exponent = torch.arange(self.frequencies, device=position_ids.device, dtype=torch.float32) / self.frequencies
        angles = position_ids[..., None] * 10_000.0**-exponent
        return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


class LearnedTimeEncoding(nn.Module):
    """A learned table of low rank: [max_positions, r] times [r, hidden_size], which starts as zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.max_positions, config.srte_rank))
        self.up = nn.Parameter(torch.empty(config.srte_rank, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random table, zero projection: the encoding starts as a no-op that has a gradient."""
        nn.init.normal_(self.table, std=1.0, generator=generator)
        nn.init.zeros_(self.up)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [B, L] to `dtype` [B, L, hidden_size]; positions must be below max_positions."""
        return self.table[position_ids].to(dtype) @ self.up.to(dtype)


def time_encoding(config: ModelConfig) -> nn.Module | None:
    """The encoding that `config.srte` names; None for `none`."""
    kinds = {"sincos": SincosTimeEncoding, "learned": LearnedTimeEncoding}
    return kinds[config.srte](config) if config.srte != "none" else None
