"""What decoding remembers. Axes: B rows, T tokens seen so far, K key-value heads, D head size, W window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .documents import Documents


@dataclass
class LayerCache:
    """One layer's memory: constant in size but for the global heads."""

    window: int  # W
    conv_tail: Tensor  # [B, taps - 1, channels], the convolution's last inputs
    state: Tensor  # [B, H, P, S] fp32, the scan's state
    ring_k: Tensor  # [B, W, windowed K, D]; token t lies in slot t mod W
    ring_v: Tensor
    global_k: Tensor  # [B, T, global K, D]
    global_v: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]."""
        for name in ("conv_tail", "state", "ring_k", "ring_v", "global_k", "global_v"):
            setattr(self, name, getattr(self, name)[rows])

    def append_global(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values [B, L, global K, D]; returns all, [B, T + L, global K, D]."""
        self.global_k, self.global_v = torch.cat([self.global_k, k], 1), torch.cat([self.global_v, v], 1)
        return self.global_k, self.global_v

    def append_ring(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Add new keys and values [B, L, windowed K, D] behind `length` tokens.

        Returns the ring as it was followed by the new ones, [B, W + L, windowed K, D].
        """
        seen = torch.cat([self.ring_k, k], 1), torch.cat([self.ring_v, v], 1)
        kept = min(k.shape[1], self.window)
        slots = torch.arange(length + k.shape[1] - kept, length + k.shape[1], device=k.device) % self.window
        self.ring_k, self.ring_v = self.ring_k.clone(), self.ring_v.clone()
        self.ring_k[:, slots], self.ring_v[:, slots] = k[:, -kept:], v[:, -kept:]
        return seen

    def append_conv(self, x: Tensor) -> Tensor:
        """Put the tail before new inputs [B, L, channels] and keep the last of them as the new tail."""
        joined = torch.cat([self.conv_tail, x], 1)
        self.conv_tail = joined[:, x.shape[1] :]
        return joined


class Cache:
    """The memory of all layers and, shared by them, which document each token seen belongs to."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str):
        """An empty cache for `rows` rows; keys, values and convolution tails in `dtype`, states in fp32."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        global_kv, D = config.global_kv_heads, config.head_dim
        windowed_kv = config.num_kv_heads - global_kv
        self.taps = config.conv_kernel
        self.seq_idx = torch.zeros(rows, 0, dtype=torch.int32, device=device)  # [B, T]
        self.layers = [
            LayerCache(
                window=config.window_at(layer),
                conv_tail=zeros(config.conv_kernel - 1, config.conv_size),
                state=zeros(config.ssm_heads, config.ssm_head_dim, config.ssm_state_size, dtype=torch.float32),
                ring_k=zeros(config.window_at(layer), windowed_kv, D),
                ring_v=zeros(config.window_at(layer), windowed_kv, D),
                global_k=zeros(0, global_kv, D),
                global_v=zeros(0, global_kv, D),
            )
            for layer in range(config.num_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.seq_idx.shape[1]

    def advance(self, documents: Documents) -> None:
        """Remember the documents of the tokens just seen; called once per forward, after all layers."""
        self.seq_idx = torch.cat([self.seq_idx, documents.seq_idx], 1)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]: beams, or rows that are not finished."""
        self.seq_idx = self.seq_idx[rows]
        for layer in self.layers:
            layer.select(rows)

    def last_document(self) -> Tensor:
        """Document of the last token seen, int32 [B]; -1 (none) when nothing was seen."""
        if self.length == 0:
            return torch.full((self.seq_idx.shape[0],), -1, dtype=torch.int32, device=self.seq_idx.device)
        return self.seq_idx[:, -1]

    def conv_documents(self, documents: Documents) -> Tensor:
        """Documents of the convolution's tail and the new tokens, int32 [B, taps - 1 + L]."""
        tail = self.seq_idx[:, max(0, self.length - (self.taps - 1)) :]
        missing = self.taps - 1 - tail.shape[1]
        nothing = torch.full_like(documents.seq_idx[:, :1], -1).expand(-1, missing)
        return torch.cat([nothing, tail, documents.seq_idx], 1)

    def global_mask(self, documents: Documents) -> Tensor:
        """Which of all keys the new queries see: bool [B, L, T + L]."""
        L = documents.seq_idx.shape[1]
        keys = torch.cat([self.seq_idx, documents.seq_idx], 1)
        index = torch.arange(self.length + L, device=keys.device)
        return (keys[:, None] == documents.seq_idx[..., None]) & (index[None] <= index[self.length :, None])

    def window_mask(self, documents: Documents, window: int) -> Tensor:
        """Which keys of the ring and the new tokens the new queries see: bool [B, L, W + L]."""
        L, T = documents.seq_idx.shape[1], self.length
        slot = torch.arange(window, device=self.seq_idx.device)
        ring_index = T - 1 - (T - 1 - slot) % window  # the newest token of each slot; negative where there is none
        new_index = torch.arange(T, T + L, device=slot.device)
        index = torch.cat([ring_index, new_index])
        keys = torch.cat([self.seq_idx, documents.seq_idx], 1)[:, index.clamp(min=0)]
        distance = new_index[:, None] - index[None]
        near = (index >= 0)[None] & (distance >= 0) & (distance < window)
        return near & (keys[:, None] == documents.seq_idx[..., None])
