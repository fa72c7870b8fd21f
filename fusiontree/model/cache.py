"""What decoding remembers. Axes: B rows, T tokens there is room for, K key-value heads, D head size, W window.

Tensors keep their place and their shape from one token to the next, and where a token goes is a number on the device:
so one step can be captured in a CUDA graph. Only `reserve` makes room, and then the tensors are new ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .documents import Documents

_LEAST_ROOM = 64  # tokens


@dataclass
class LayerCache:
    """One layer's memory: constant in size but for the global heads."""

    conv_tail: Tensor  # [B, taps - 1, channels], the convolution's last inputs
    state: Tensor  # [B, H, P, S] fp32, the scan's state
    ring_k: Tensor  # [B, W, windowed K, D]; token t lies in slot t mod W
    ring_v: Tensor
    global_k: Tensor  # [B, T, global K, D]
    global_v: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def append_conv(self, x: Tensor) -> Tensor:
        """Put the tail before new inputs [B, L, channels] and keep the last of them as the new tail."""
        joined = torch.cat([self.conv_tail, x], 1)
        self.conv_tail.copy_(joined[:, x.shape[1] :].detach())
        return joined


class Cache:
    """The memory of all layers and, shared by them, which document each token seen belongs to."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str):
        """An empty cache for `rows` rows; keys, values and convolution tails in `dtype`, states in fp32."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        global_kv, D = config.global_kv_heads, config.head_dim
        windowed_kv = config.num_kv_heads - global_kv
        self.config = config
        self.length = 0  # tokens seen so far, padding included
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self.next_position = torch.zeros(rows, dtype=torch.int64, device=device)  # in its document, if it goes on
        self.seq_idx = torch.full((rows, 0), -1, dtype=torch.int32, device=device)  # [B, T], -1 where there is none
        self.tail_documents = torch.full((rows, config.conv_kernel - 1), -1, dtype=torch.int32, device=device)
        self.layers = [
            LayerCache(
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
    def last_document(self) -> Tensor:
        """Document of the last token seen, int32 [B]; -1 (none) when nothing was seen."""
        return self.tail_documents[:, -1]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; room that must grow at least doubles."""
        room = self.seq_idx.shape[1]
        if tokens <= room:
            return
        more = max(tokens, 2 * room, _LEAST_ROOM) - room
        self.seq_idx = torch.nn.functional.pad(self.seq_idx, (0, more), value=-1)
        for layer in self.layers:
            layer.global_k = torch.nn.functional.pad(layer.global_k, (0, 0, 0, 0, 0, more))
            layer.global_v = torch.nn.functional.pad(layer.global_v, (0, 0, 0, 0, 0, more))

    def begin(self, documents: Documents) -> None:
        """Take in which documents the new tokens belong to, before any layer sees them."""
        L = documents.seq_idx.shape[1]
        if L == 1:
            self.seq_idx.index_copy_(1, self.position, documents.seq_idx)
        else:
            self.seq_idx[:, self.length : self.length + L] = documents.seq_idx

    def end(self, documents: Documents) -> None:
        """Go on behind the new tokens, after all layers have seen them."""
        L = documents.seq_idx.shape[1]
        self.length += L
        self.position += L
        self.next_position.copy_(documents.position_ids[:, -1] + 1)
        kept = torch.cat([self.tail_documents, documents.seq_idx], 1)[:, -self.tail_documents.shape[1] :]
        self.tail_documents.copy_(kept)

    def next_token(self) -> Documents:
        """Documents of one more token that goes on with the document of its row; it does not wait for the device."""
        rows = self.next_position.shape[0]
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=self.position.device)
        return Documents(self.next_position[:, None].clone(), self.last_document[:, None].clone(), bounds, 1)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]: beams, or rows that are not finished."""
        for name in ("next_position", "seq_idx", "tail_documents"):
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.layers:
            layer.select(rows)

    def conv_documents(self, documents: Documents) -> Tensor:
        """Documents of the convolution's tail and the new tokens, int32 [B, taps - 1 + L]."""
        return torch.cat([self.tail_documents, documents.seq_idx], 1)

    def attend(
        self, layer: int, k: Tensor, v: Tensor, documents: Documents, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remember new keys and values of one kind of head; what their queries attend to, and which of it they see.

        Args:
            k, v: [B, L, K, D]. window: of these heads; None for the global ones.

        Returns:
            Keys and values [B, seen, K, D], and the mask: bool [B, seen] if L is 1, else [B, L, seen]; None when
            nothing came before, so that the new tokens attend to one another alone.
        """
        memory = self.layers[layer]
        k, v = k.detach(), v.detach()
        if window is None:
            return self._attend_global(memory.global_k, memory.global_v, k, v, documents)
        return self._attend_window(memory.ring_k, memory.ring_v, k, v, documents, window)

    def filled(self, window: int | None) -> Tensor:
        """How far the keys that one new token attends to are filled, int64 [1]."""
        return self.position + 1 if window is None else (self.position + 1).clamp(max=window)

    def _attend_global(
        self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        L, start = k.shape[1], self.length
        if L == 1:
            keys.index_copy_(1, self.position, k)
            values.index_copy_(1, self.position, v)
            return keys, values, documents.once("global", lambda: self.seq_idx == documents.seq_idx)
        keys[:, start : start + L], values[:, start : start + L] = k, v
        if start == 0:
            return k, v, None
        mask = documents.once("global", lambda: self._global_mask(documents))
        return keys[:, : start + L], values[:, : start + L], mask

    def _global_mask(self, documents: Documents) -> Tensor:
        L = documents.seq_idx.shape[1]
        index = torch.arange(self.length + L, device=self.seq_idx.device)
        same = self.seq_idx[:, None, : self.length + L] == documents.seq_idx[..., None]
        return same & (index[None] <= index[self.length :, None])

    def _attend_window(
        self, ring_k: Tensor, ring_v: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        L, start = k.shape[1], self.length
        if L == 1:
            slot = self.position % window
            ring_k.index_copy_(1, slot, k)
            ring_v.index_copy_(1, slot, v)
            return ring_k, ring_v, documents.once(("window", window), lambda: self._ring_mask(documents, window))
        seen = (k, v) if start == 0 else (torch.cat([ring_k, k], 1), torch.cat([ring_v, v], 1))
        kept = min(L, window)
        slots = torch.arange(start + L - kept, start + L, device=k.device) % window
        ring_k[:, slots], ring_v[:, slots] = k[:, -kept:], v[:, -kept:]
        if start == 0:
            return *seen, None
        return *seen, documents.once(("window", window), lambda: self._window_mask(documents, window))

    def _ring_mask(self, documents: Documents, window: int) -> Tensor:
        """Which slots of the ring, the new token's among them, the new token sees: bool [B, W]."""
        index = self._ring_index(self.position, window)
        same = self.seq_idx.index_select(1, index.clamp(min=0)) == documents.seq_idx
        return same & (index >= 0)

    def _window_mask(self, documents: Documents, window: int) -> Tensor:
        """Which of the ring and the new tokens the new queries see: bool [B, L, W + L]."""
        new = torch.arange(self.length, self.length + documents.seq_idx.shape[1], device=self.seq_idx.device)
        index = torch.cat([self._ring_index(self.position - 1, window), new])
        keys = self.seq_idx[:, index.clamp(min=0)]
        distance = new[:, None] - index[None]
        near = (index >= 0)[None] & (distance >= 0) & (distance < window)
        return near & (keys[:, None] == documents.seq_idx[..., None])

    @staticmethod
    def _ring_index(newest: Tensor, window: int) -> Tensor:
        """The newest token of each slot when `newest` is the last one in the ring: int64 [W], below 0 where none is."""
        slot = torch.arange(window, device=newest.device)
        return newest - (newest - slot) % window
