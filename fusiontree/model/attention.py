"""The attention branch. Axes: B rows, L tokens, N query heads, K key-value heads, D head size."""

import torch
from torch import Tensor, nn

from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .layers import Linear, RMSNorm
from .ops import Kernels
from .reference import attention_cached


class AttentionBranch(nn.Module):
    """Grouped-query attention with rotary positions and normed queries and keys, its own norm and output projection.

    The first `global_heads` query heads see their whole document, the rest a window.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels
        width = config.num_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.norm = RMSNorm(width, config.norm_eps)
        self.out_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents, cache: Cache | None) -> Tensor:
        """[B, L, hidden_size] to [B, L, hidden_size]; continues and updates `cache` when there is one."""
        D = self.config.head_dim
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, D))), rotary)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, D))), rotary)
        v = self.v_proj(x).unflatten(-1, (-1, D))
        global_kv, global_q = self.config.global_kv_heads, self.config.global_heads
        outputs = [
            self._attend(q[:, :, heads], k[:, :, kv], v[:, :, kv], documents, cache, window)
            for heads, kv, window in (
                (slice(0, global_q), slice(0, global_kv), None),
                (slice(global_q, None), slice(global_kv, None), self.config.window_at(self.layer)),
            )
            if k[:, :, kv].shape[2]
        ]
        return self.out_proj(self.norm(torch.cat(outputs, 2).flatten(-2)))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: Cache | None, window: int | None
    ) -> Tensor:
        """Attention of one kind of head; [B, L, heads, D]."""
        if cache is not None:
            layer, length = cache.layers[self.layer], cache.length
            seen = layer.append_global(k, v) if window is None else layer.append_ring(k, v, length)
            if length > 0:
                mask = cache.global_mask(documents) if window is None else cache.window_mask(documents, window)
                return attention_cached(q, *seen, mask)
        return self.kernels.attention(q, k, v, documents.seq_idx, documents.bounds, window)


def rotary_embedding(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (arXiv 2104.09864), fp32 [B, L, 1, D / 2] each."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None] * base**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head, in fp32; [B, L, heads, D] in the dtype of x."""
    cos, sin = rotary
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
