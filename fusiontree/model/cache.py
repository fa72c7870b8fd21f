"""What decoding remembers. Axes: B rows, T tokens there is room for, K key-value heads, D head size, W window.

Tensors keep their place and their shape from one token to the next, and where a token goes is a number on the device:
so one step can be captured in a CUDA graph. Only `reserve`, when there is too little room, and `select` make new ones.
No gradient passes through the cache: what it remembers is a value.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .documents import Documents

_LEAST_ROOM = 64  # tokens
_BY_ROW = ("next_position", "seq_idx", "last_document", "tail_documents")  # of a cache, what it knows of each row


@dataclass
class LayerCache:
    """One layer's memory: constant in size but for the global heads, and empty for a branch that it does not have."""

    conv_tail: Tensor  # [B, taps - 1, channels], the convolution's last inputs
    state: Tensor  # [B, H, P, S] fp32, the scan's state
    ring_k: Tensor  # [B, W, windowed K, D]; token t lies in slot t mod W
    ring_v: Tensor
    global_k: Tensor  # [B, T, global K, D]
    global_v: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]."""
        rows = rows.to(self.state.device)
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def move(self, device: torch.device) -> None:
        """Go to `device`, where the layer computes."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def row(self, here: slice, start: int) -> "LayerCache":
        """The same memory seen by one row, whose tokens begin at `start` of the others'."""
        parts = {name: value[here] for name, value in vars(self).items()}
        return LayerCache(**{name: part[:, start:] if "global" in name else part for name, part in parts.items()})

    def turn(self, tokens: int) -> None:
        """Move what the rings hold to the slots of tokens that stand `tokens` later."""
        for ring in (self.ring_k, self.ring_v):
            ring.copy_(ring.roll(tokens % ring.shape[1], 1))

    def append_conv(self, x: Tensor) -> Tensor:
        """Put the tail before new inputs [B, L, channels] and keep the last of them as the new tail."""
        joined = torch.cat([self.conv_tail, x], 1)
        self.conv_tail.copy_(joined[:, x.shape[1] :].detach())
        return joined


def _empty_layer(config: ModelConfig, layer: int, zeros: Callable[..., Tensor]) -> LayerCache:
    global_kv, windowed_kv = config.kv_heads_at(layer)
    window, D = config.window_at(layer), config.head_dim
    channels, heads = (config.conv_size, config.ssm_heads) if config.has("mamba", layer) else (0, 0)
    return LayerCache(
        conv_tail=zeros(config.conv_kernel - 1, channels),
        state=zeros(heads, config.ssm_head_dim, config.ssm_state_size, dtype=torch.float32),
        ring_k=zeros(window, windowed_kv, D),
        ring_v=zeros(window, windowed_kv, D),
        global_k=zeros(0, global_kv, D),
        global_v=zeros(0, global_kv, D),
    )


class Cache:
    """The memory of all layers and, shared by them, which document each token seen belongs to."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str):
        """An empty cache for `rows` rows; keys, values and convolution tails in `dtype`, states in fp32."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.config = config
        self.length = 0  # tokens seen so far, padding included
        self.whole = True  # whether each row is one document, from its first token on
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self.next_position = torch.zeros(rows, dtype=torch.int64, device=device)  # in its document, if it goes on
        self.seq_idx = torch.full((rows, 0), -1, dtype=torch.int32, device=device)  # [B, T], -1 where there is none
        self.last_document = torch.full((rows,), -1, dtype=torch.int32, device=device)  # -1 when nothing was seen
        self.tail_documents = torch.full((rows, config.conv_kernel - 1), -1, dtype=torch.int32, device=device)
        self._made: dict[Hashable, Any] = {}  # what the layers of one forward share
        self.layers = [_empty_layer(config, layer, zeros) for layer in range(config.num_layers)]

    def to(self, device: torch.device | str | int) -> "Cache":
        """The same memory for a layer on `device`, until the next tokens: what all layers share is copied there."""
        device = torch.device(device)
        return self if device == self.position.device else self._once(("on", device), lambda: self._on(device))

    def _on(self, device: torch.device) -> "Cache":
        there = copy.copy(self)
        there._made = {}
        for name in ("position", *_BY_ROW):
            setattr(there, name, getattr(self, name).to(device))
        return there

    def layer(self, layer: int) -> LayerCache:
        """The memory of one layer, which moves to where the layer computes when it is first asked for there."""
        memory = self.layers[layer]
        if memory.state.device != self.position.device:
            memory.move(self.position.device)
        return memory

    @property
    def room(self) -> int:
        """Tokens that fit before the cache's tensors must be new ones."""
        return self.seq_idx.shape[1]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; room that must grow at least doubles."""
        if tokens <= self.room:
            return
        more = max(tokens, 2 * self.room, _LEAST_ROOM) - self.room
        self.seq_idx = torch.nn.functional.pad(self.seq_idx, (0, more), value=-1)
        for layer in self.layers:
            layer.global_k = torch.nn.functional.pad(layer.global_k, (0, 0, 0, 0, 0, more))
            layer.global_v = torch.nn.functional.pad(layer.global_v, (0, 0, 0, 0, 0, more))

    def begin(self, documents: Documents) -> None:
        """Take in which documents the new tokens belong to, before any layer sees them."""
        self._made.clear()
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
        self.last_document.copy_(documents.seq_idx[:, -1])
        self.tail_documents.copy_(torch.cat([self.tail_documents, documents.seq_idx], 1)[:, L:])

    def next_token(self) -> Documents:
        """Documents of one more token that goes on with the document of its row; it does not wait for the device."""
        rows = self.next_position.shape[0]
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=self.position.device)
        return Documents(self.next_position[:, None].clone(), self.last_document[:, None].clone(), bounds, 1)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) `rows`, int64 [new B]: beams, or rows that are not finished."""
        for name in _BY_ROW:
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.layers:
            layer.select(rows)

    def row(self, index: int, start: int) -> "Cache":
        """A row that has seen nothing as a cache of its own: it writes into this one, from token `start` on.

        `join` makes what rows have seen this cache's own.
        """
        row, here = copy.copy(self), slice(index, index + 1)
        row.length, row.whole, row._made = 0, True, {}
        row.position = torch.zeros_like(self.position)
        row.seq_idx = self.seq_idx[here, start:]
        for name in ("next_position", "last_document", "tail_documents"):
            setattr(row, name, getattr(self, name)[here])
        row.layers = [layer.row(here, start) for layer in self.layers]
        return row

    def join(self, rows: Sequence["Cache"], length: int) -> None:
        """Go on behind the last tokens of `rows`, of every `row`, which end together at token `length`."""
        self.length = length
        self.position.fill_(length)
        self.whole = all(row.length == self.length for row in rows)
        for row in rows:
            for layer in row.layers:
                layer.turn(length - row.length)

    def conv_documents(self, documents: Documents) -> Tensor:
        """Documents of the convolution's tail and the new tokens, int32 [B, taps - 1 + L]."""
        return torch.cat([self.tail_documents, documents.seq_idx], 1)

    def place(self, layer: int, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Where one new token of a kind of head goes: keys and values [B, room or W, K, D], and the slot, int64 [1].

        Args:
            window: of these heads; None for the global ones.

        Returns:
            Keys and values, with room for more behind them or the whole ring in its own order (`visible`); the slot.
        """
        memory = self.layer(layer)
        if window is None:
            return memory.global_k, memory.global_v, self.position
        return memory.ring_k, memory.ring_v, self._once(("slot", window), lambda: self.position % window)

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Remember keys and values [B, L, K, D] of several new tokens; return what came before and them, in order.

        `window`, as in `place`; which of them a token sees says `mask`.
        """
        memory, end = self.layer(layer), self.length + k.shape[1]
        k, v = k.detach(), v.detach()
        if window is not None:
            return self._extend_ring(memory.ring_k, memory.ring_v, k, v, window)
        keys, values = memory.global_k, memory.global_v
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]

    def _extend_ring(self, ring_k: Tensor, ring_v: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        L, start = k.shape[1], self.length
        before = torch.arange(max(0, start - window), start, device=k.device) % window
        seen = torch.cat([ring_k[:, before], k], 1), torch.cat([ring_v[:, before], v], 1)
        kept = min(L, window)
        slots = torch.arange(start + L - kept, start + L, device=k.device) % window
        ring_k[:, slots], ring_v[:, slots] = k[:, -kept:], v[:, -kept:]
        return seen

    def visible(self, documents: Documents, window: int | None) -> Tensor:
        """Which of the keys that `place` gave one new token it sees: bool [B, room or W]."""
        if window is None:
            return self._once("visible", lambda: self.seq_idx == documents.seq_idx)
        return self._once(("visible", window), lambda: self._visible_in_ring(documents, window))

    def continues(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Which of the convolution's last inputs, and whether the scan's state, are of the one new token's document.

        Bool [B, taps - 1], the newest last, and bool [B].
        """
        new = documents.seq_idx
        return self._once("continues", lambda: (self.tail_documents == new, self.last_document == new[:, 0]))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first layer of a forward that asks for `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _visible_in_ring(self, documents: Documents, window: int) -> Tensor:
        slot = torch.arange(window, device=self.position.device)
        index = self.position - (self.position - slot) % window  # the newest token of each slot; below 0 where none is
        same = self.seq_idx.index_select(1, index.clamp(min=0)) == documents.seq_idx
        return same & (index >= 0)

    def filled(self, window: int | None) -> Tensor:
        """How far the keys that one new token attends to are filled, int64 [1]."""
        if window is None:
            return self._once("filled", lambda: self.position + 1)
        return self._once(("filled", window), lambda: (self.position + 1).clamp(max=window))

    def mask(self, documents: Documents, window: int | None) -> Tensor:
        """Which of the keys that `extend` gave several new tokens each of them sees: bool [B, L, keys]."""
        return self._once(("mask", window), lambda: self._mask(documents, window))

    def _mask(self, documents: Documents, window: int | None) -> Tensor:
        end = self.length + documents.seq_idx.shape[1]
        first = 0 if window is None else max(0, self.length - window)
        index = torch.arange(first, end, device=self.seq_idx.device)
        new = index[self.length - first :, None]
        near = index <= new
        if window is not None:
            near &= index > new - window
        return near & (self.seq_idx[:, None, first:end] == documents.seq_idx[..., None])
