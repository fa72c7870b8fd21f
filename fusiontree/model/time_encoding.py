"""Shared relative time encoding (SRTE): a token's position in its document, as an input of the Mamba branch."""

import torch
from torch import Tensor, nn

from .config import ModelConfig


class SincosTimeEncoding(nn.Module):
    """Sines and cosines of the position at geometric wavelengths from 2π to 10,000·2π (arXiv 1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.frequencies = config.hidden_size // 2

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode positions, int64 [B, L], as `dtype` [B, L, hidden_size]."""
        exponent = torch.arange(self.frequencies, device=position_ids.device, dtype=torch.float32) / self.frequencies
        angles = position_ids[..., None] * 10_000.0**-exponent
        return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


class LearnedTimeEncoding(nn.Module):
    """Learned low-rank table, [max_positions, r] times [r, hidden_size]; zero at initialization."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.max_positions, config.srte_rank))
        self.up = nn.Parameter(torch.empty(config.srte_rank, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize a random table and a zero projection: the encoding is zero, but its gradient is not."""
        nn.init.normal_(self.table, std=1.0, generator=generator)
        nn.init.zeros_(self.up)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode positions, int64 [B, L] below max_positions, as `dtype` [B, L, hidden_size]."""
        return self.table[position_ids].to(dtype) @ self.up.to(dtype)


def time_encoding(config: ModelConfig) -> nn.Module | None:
    """Return the encoding that `config.srte` selects; None for `none`."""
    kinds = {"sincos": SincosTimeEncoding, "learned": LearnedTimeEncoding}
    return kinds[config.srte](config) if config.srte != "none" else None
