"""The attention branch. Axes: B rows, L tokens, N query heads, K key-value heads, D head size."""

import torch
from torch import Tensor, nn

from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .kernel_registry import Kernels
from .layers import Linear
from .reference import attention_cached


class AttentionBranch(nn.Module):
    """Grouped-query attention with RoPE and QK norm, followed by the branch's own norm and output projection.

    The first `global_heads` query heads see their full document, the others a sliding window.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels
        kv_heads = sum(config.kv_heads_at(layer))
        width = kv_heads * config.queries_per_kv * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, width + 2 * kv_heads * config.head_dim)
        self.q_norm = nn.Parameter(torch.empty(config.head_dim))
        self.k_norm = nn.Parameter(torch.empty(config.head_dim))
        self.norm = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(width, config.hidden_size, config.residual_std)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the norm weights to one."""
        for weight in (self.q_norm, self.k_norm, self.norm):
            nn.init.ones_(weight)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents, cache: Cache | None) -> Tensor:
        """Return the branch's output; shapes [B, L, hidden_size]. `cache`, if any, is continued in place."""
        pointwise, eps = self.kernels.pointwise, self.config.norm_eps
        kinds = self.config.kv_heads_by_window(self.layer)
        groups = [heads for heads, _ in kinds]
        parts = pointwise.attention_inputs(self.qkv_proj(x), self.q_norm, self.k_norm, rotary, eps, groups)
        outputs = [
            self._attend(q, k, v, documents, cache, window) for (q, k, v), (_, window) in zip(parts, kinds, strict=True)
        ]
        return self.out_proj(pointwise.joined_norm(outputs, self.norm, eps))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: Cache | None, window: int | None
    ) -> Tensor:
        """Return the attention output of the global or the windowed heads: [B, L, heads, D]."""
        if cache is None:
            return self.kernels.attention(q, k, v, documents, window)
        if q.shape[1] == 1:
            keys, values, slot = cache.decode_buffers(self.layer, window)
            self.kernels.pointwise.write_kv(keys, values, k.detach(), v.detach(), slot)
            return self.kernels.decode(q, keys, values, cache.visible(documents, window), cache.key_count(window))
        keys, values = cache.append(self.layer, k, v, window)
        if cache.length == 0:
            return self.kernels.attention(q, k, v, documents, window)
        if cache.one_document:
            return self.kernels.prefill(q, keys, values, window)
        return attention_cached(q, keys, values, cache.mask(documents, window))


def rotary_embedding(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the RoPE angles (arXiv 2104.09864): fp32 [B, L, 1, D / 2] each."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None] * base**-exponent
    return angles.cos(), angles.sin()
