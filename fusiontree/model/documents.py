"""Document boundaries in packed rows. Axes: B rows, L tokens."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents in B rows of L tokens, between which no information flows.

    A run of padding tokens is a document of its own. Padding therefore needs no mask, and every query has a valid key.
    """

    position_ids: Tensor  # int64 [B, L], from 0 at each document's start
    seq_idx: Tensor  # int32 [B, L], index of the document in its row; never decreases along a row
    cu_seqlens: Tensor  # int32 [documents + 1], bounds over the flattened B·L tokens; each row starts a document
    max_seqlen: int  # length of the longest document, in tokens
    _memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed at the first call with `key` and shared by later calls, one per layer."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def to(self, device: torch.device | str | int) -> "Documents":
        """Return a copy on `device`, made once per device: a model may be spread over several."""
        device = torch.device(device)
        if device == self.seq_idx.device:
            return self
        names = ("position_ids", "seq_idx", "cu_seqlens")
        return self.once(
            device, lambda: replace(self, _memo={}, **{name: getattr(self, name).to(device) for name in names})
        )

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` as a list on the host."""
        return self.cu_seqlens.tolist()

    @classmethod
    def one_per_row(cls, rows: int, length: int, device: torch.device | str) -> "Documents":
        """Return documents that each fill one row."""
        return cls.from_seq_idx(torch.zeros(rows, length, dtype=torch.int32, device=device))

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Documents":
        """Return the documents of rows with padding on either side.

        Args:
            mask: [B, L], bool or integer; true where the token is real.
        """
        mask = mask.bool()
        changed = torch.zeros_like(mask)
        changed[:, 1:] = mask[:, 1:] != mask[:, :-1]
        return cls.from_seq_idx(changed.cumsum(1).int())

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> "Documents":
        """Return documents from each token's document index, int32 [B, L], which never decreases along a row."""
        B, L = seq_idx.shape
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        index = torch.arange(L, device=seq_idx.device).expand(B, L)
        position_ids = index - torch.where(starts, index, 0).cummax(1).values
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([B * L], device=seq_idx.device)])
        return cls(position_ids, seq_idx, cu_seqlens.int(), int(cu_seqlens.diff().max()))

    @classmethod
    def continuing(cls, document: Tensor, position: Tensor, starts: Tensor) -> "Documents":
        """Return the documents of new tokens that follow earlier tokens of the same rows.

        Args:
            document: int32 [B], document index of each row's last earlier token.
            position: int64 [B], the next position in that document.
            starts: bool [B, L], true where a new token starts a document.
        """
        seq_idx = document[:, None] + starts.cumsum(1).int()
        new = cls.from_seq_idx(seq_idx)
        before = torch.where(seq_idx == document[:, None], position[:, None], 0)
        return replace(new, position_ids=new.position_ids + before)

    def last(self, tokens: int) -> "Documents":
        """Return the documents of the last `tokens` tokens of each row, with positions as before."""
        if tokens == self.seq_idx.shape[1]:
            return self
        tail = Documents.from_seq_idx(self.seq_idx[:, -tokens:])
        return Documents(self.position_ids[:, -tokens:], tail.seq_idx, tail.cu_seqlens, tail.max_seqlen)


def to_device(batch: Any, device: torch.device | str) -> tuple[Tensor, Tensor, Documents]:
    """Copy a batch of numpy arrays (`input_ids`, `labels` and the fields of `Documents`) to `device`."""

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    documents = Documents(tensor(batch.position_ids), tensor(batch.seq_idx), tensor(batch.cu_seqlens), batch.max_seqlen)
    return tensor(batch.input_ids), tensor(batch.labels), documents
