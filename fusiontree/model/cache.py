"""The cache for decoding. Axes: B rows, T tokens of capacity, K key-value heads, D head size, W window.

A decoding step keeps the address and the shape of every tensor, and reads the write position from the device, so the
step can be captured in a CUDA graph. Only `reserve` beyond the capacity and `select` allocate new tensors. The cache
stores detached values: no gradient passes through it.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .config import ModelConfig
from .documents import Documents

_MIN_CAPACITY = 64  # tokens


@dataclass
class LayerCache:
    """One layer's cache. Only the part of the global heads grows; tensors of a missing branch are empty."""

    conv_tail: Tensor  # [B, taps - 1, channels], the last inputs of the convolution
    state: Tensor  # [B, H, P, S], fp32, state of the scan
    ring_k: Tensor  # [B, W, windowed K, D], ring buffer: token t is in slot t mod W
    ring_v: Tensor
    global_k: Tensor  # [B, T, global K, D]
    global_v: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder `rows`, int64 [new B]."""
        rows = rows.to(self.state.device)
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def move(self, device: torch.device) -> None:
        """Move all tensors to `device`."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def row_view(self, here: slice, start: int) -> "LayerCache":
        """Return views of one row, whose first token is token `start` of the other rows."""
        parts = {name: value[here] for name, value in vars(self).items()}
        return LayerCache(**{name: part[:, start:] if "global" in name else part for name, part in parts.items()})

    def shift_rings(self, tokens: int) -> None:
        """Rotate the ring buffers to the slots of positions that are `tokens` later."""
        for ring in (self.ring_k, self.ring_v):
            ring.copy_(ring.roll(tokens % ring.shape[1], 1))

    def append_conv(self, x: Tensor) -> Tensor:
        """Prepend the tail to new inputs [B, L, channels], and store the last inputs as the new tail."""
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


def _put_rows(whole: Tensor, rows: Tensor, part: Tensor) -> None:
    """Copy `part` [n, ...] into `rows`, int64 [n], of `whole` [B, ...], whose second axis may be longer."""
    if part.ndim > 1:
        whole = whole[:, : part.shape[1]]
    whole[rows.to(whole.device)] = part.to(whole.device)


class Cache:
    """The caches of all layers, and the document of each cached token, which the layers share."""

    BY_ROW: tuple[str, ...] = ("next_position", "seq_idx", "last_document", "tail_documents")  # tensors with axis B

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str):
        """Create an empty cache for `rows` rows; keys, values and convolution tails in `dtype`, states in fp32."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.config = config
        self.length = 0  # cached tokens of a row, padding included
        self.one_document = True  # whether each row is a single document
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # `length` on the device
        self.next_position = torch.zeros(rows, dtype=torch.int64, device=device)  # in the row's last document
        self.seq_idx = torch.full((rows, 0), -1, dtype=torch.int32, device=device)  # [B, T], -1 at free places
        self.last_document = torch.full((rows,), -1, dtype=torch.int32, device=device)  # -1 in an empty cache
        self.tail_documents = torch.full((rows, config.conv_kernel - 1), -1, dtype=torch.int32, device=device)
        self._memo: dict[Hashable, Any] = {}  # values that the layers share in one forward pass
        self.layers = [_empty_layer(config, layer, zeros) for layer in range(config.num_layers)]

    def to(self, device: torch.device | str | int) -> "Cache":
        """Return this cache for layers on `device`: shared tensors are copied there, once per forward pass."""
        device = torch.device(device)
        return self if device == self.position.device else self._once(("on", device), lambda: self._on(device))

    def _on(self, device: torch.device) -> "Cache":
        there = copy.copy(self)
        there._memo = {}
        for name in ("position", *self.BY_ROW):
            setattr(there, name, getattr(self, name).to(device))
        return there

    def layer(self, layer: int) -> LayerCache:
        """Return the cache of one layer, after moving it to this object's device if necessary."""
        cached = self.layers[layer]
        if cached.state.device != self.position.device:
            cached.move(self.position.device)
        return cached

    @property
    def capacity(self) -> int:
        """Tokens of a row that fit without a new allocation."""
        return self.seq_idx.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(value.nbytes for layer in self.layers for value in vars(layer).values())

    def reserve(self, tokens: int) -> None:
        """Grow the capacity to at least `tokens` tokens; each growth at least doubles it."""
        if tokens <= self.capacity:
            return
        more = max(tokens, 2 * self.capacity, _MIN_CAPACITY) - self.capacity
        self.seq_idx = torch.nn.functional.pad(self.seq_idx, (0, more), value=-1)
        for layer in self.layers:
            layer.global_k = torch.nn.functional.pad(layer.global_k, (0, 0, 0, 0, 0, more))
            layer.global_v = torch.nn.functional.pad(layer.global_v, (0, 0, 0, 0, 0, more))

    def begin(self, documents: Documents) -> None:
        """Record the documents of the new tokens, before the first layer runs."""
        self._memo.clear()
        L = documents.seq_idx.shape[1]
        if L == 1:
            self.seq_idx.index_copy_(1, self.position, documents.seq_idx)
        else:
            self.seq_idx[:, self.length : self.length + L] = documents.seq_idx

    def end(self, documents: Documents) -> None:
        """Advance past the new tokens, after the last layer."""
        L = documents.seq_idx.shape[1]
        self.length += L
        self.position += L
        self.next_position.copy_(documents.position_ids[:, -1] + 1)
        self.last_document.copy_(documents.seq_idx[:, -1])
        self.tail_documents.copy_(torch.cat([self.tail_documents, documents.seq_idx], 1)[:, L:])

    def next_token(self) -> Documents:
        """Return the documents of one more token per row, which continues its row's document; no device sync."""
        rows = self.next_position.shape[0]
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=self.position.device)
        return Documents(self.next_position[:, None].clone(), self.last_document[:, None].clone(), bounds, 1)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder `rows`, int64 [new B]: beams, or unfinished rows."""
        for name in self.BY_ROW:
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.layers:
            layer.select(rows)

    def take(self, rows: Tensor) -> Self:
        """Return a copy of `rows`, int64 [n], as a cache of its own; `join` puts them back."""
        part = copy.copy(self)
        part._memo, part.position = {}, self.position.clone()
        part.layers = [copy.copy(layer) for layer in self.layers]
        part.select(rows)
        return part

    def pad_left(self, tokens: int) -> None:
        """Insert `tokens` padding tokens before the first token of every row."""
        if tokens == 0:
            return
        end = self.length + tokens
        self.reserve(end)
        self.seq_idx[:, :end] = torch.nn.functional.pad(self.seq_idx[:, : self.length], (tokens, 0), value=-1)
        for layer in self.layers:
            for buffer in (layer.global_k, layer.global_v):
                buffer[:, :end] = buffer[:, :end].roll(tokens, 1)
            layer.shift_rings(tokens)
        self.length = end
        self.position.fill_(end)
        self.one_document = False

    def join(self, parts: Sequence[tuple[Tensor, "Cache"]]) -> None:
        """Replace every row of this cache by that of the continued `parts`, which all end at the same token.

        Args:
            parts: rows, int64 [n], and their cache from `take`.
        """
        self.length = parts[0][1].length
        self.position.fill_(self.length)
        self.one_document = all(part.one_document for _, part in parts)
        self.reserve(max(part.capacity for _, part in parts))
        for rows, part in parts:
            for name in self.BY_ROW:
                _put_rows(getattr(self, name), rows, getattr(part, name))
            for layer, layer_part in zip(self.layers, part.layers, strict=True):
                for name, value in vars(layer).items():
                    _put_rows(value, rows, getattr(layer_part, name))

    def row_view(self, index: int, start: int) -> "Cache":
        """Return one row of an empty cache as a cache that writes into this one, from token `start`.

        `merge_rows` updates this cache after the rows are prefilled.
        """
        row, here = copy.copy(self), slice(index, index + 1)
        row.length, row.one_document, row._memo = 0, True, {}
        row.position = torch.zeros_like(self.position)
        row.seq_idx = self.seq_idx[here, start:]
        for name in ("next_position", "last_document", "tail_documents"):
            setattr(row, name, getattr(self, name)[here])
        row.layers = [layer.row_view(here, start) for layer in self.layers]
        return row

    def merge_rows(self, rows: Sequence["Cache"], length: int) -> None:
        """Continue after the prefilled `rows`, the `row_view` of every row, which all end at token `length`."""
        self.length = length
        self.position.fill_(length)
        self.one_document = all(row.length == self.length for row in rows)
        for row in rows:
            for layer in row.layers:
                layer.shift_rings(length - row.length)

    def conv_documents(self, documents: Documents) -> Tensor:
        """Return the documents of the convolution's tail and the new tokens, int32 [B, taps - 1 + L]."""
        return torch.cat([self.tail_documents, documents.seq_idx], 1)

    def decode_buffers(self, layer: int, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the buffers of a decoding step, and the slot that its token is written to.

        Args:
            layer: index of the layer, from 0.
            window: of the heads, in tokens; None for the global heads.

        Returns:
            Keys and values [B, capacity or W, K, D], where those of a window are in ring order, and the slot, int64
            [1]. `visible` gives the mask.
        """
        cached = self.layer(layer)
        if window is None:
            return cached.global_k, cached.global_v, self.position
        return cached.ring_k, cached.ring_v, self._once(("slot", window), lambda: self.position % window)

    def append(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, L, K, D] of several new tokens.

        `layer` and `window` as in `decode_buffers`.

        Returns:
            The earlier keys and values within reach and the new ones, in order; `mask` gives the mask.
        """
        cached, end = self.layer(layer), self.length + k.shape[1]
        k, v = k.detach(), v.detach()
        if window is not None:
            return self._append_to_ring(cached.ring_k, cached.ring_v, k, v, window)
        keys, values = cached.global_k, cached.global_v
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]

    def _append_to_ring(
        self, ring_k: Tensor, ring_v: Tensor, k: Tensor, v: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        L, start = k.shape[1], self.length
        before = torch.arange(max(0, start - window), start, device=k.device) % window
        seen = torch.cat([ring_k[:, before], k], 1), torch.cat([ring_v[:, before], v], 1)
        kept = min(L, window)
        slots = torch.arange(start + L - kept, start + L, device=k.device) % window
        ring_k[:, slots], ring_v[:, slots] = k[:, -kept:], v[:, -kept:]
        return seen

    def visible(self, documents: Documents, window: int | None) -> Tensor:
        """Return the mask of a decoding step over the keys of `decode_buffers`: bool [B, capacity or W]."""
        if window is None:
            return self._once("visible", lambda: self.seq_idx == documents.seq_idx)
        return self._once(("visible", window), lambda: self._visible_in_ring(documents, window))

    def continues(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Compare the cached documents with that of a decoding step's token.

        Returns:
            Whether each of the convolution's last inputs, the newest last, is of this document, bool [B, taps - 1];
            and whether the scan's state is, bool [B].
        """
        new = documents.seq_idx
        return self._once("continues", lambda: (self.tail_documents == new, self.last_document == new[:, 0]))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed for the first layer of a forward pass and shared by the others."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _visible_in_ring(self, documents: Documents, window: int) -> Tensor:
        slot = torch.arange(window, device=self.position.device)
        index = self.position - (self.position - slot) % window  # newest token of each slot; negative in empty slots
        same = self.seq_idx.index_select(1, index.clamp(min=0)) == documents.seq_idx
        return same & (index >= 0)

    def key_count(self, window: int | None) -> Tensor:
        """Return the number of filled slots in the keys of `decode_buffers` after the new token, int64 [1]."""
        if window is None:
            return self._once("filled", lambda: self.position + 1)
        return self._once(("filled", window), lambda: (self.position + 1).clamp(max=window))

    def mask(self, documents: Documents, window: int | None) -> Tensor:
        """Return the mask of several new tokens over the keys of `append`: bool [B, L, keys]."""
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
