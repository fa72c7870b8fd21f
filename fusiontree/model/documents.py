"""Where documents lie in packed rows. Axes: B rows, L tokens."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of B rows of L tokens; nothing of one ever reaches another.

    A stretch of padding is a document of its own: so it needs no mask, and no row is without a valid key.
    """

    position_ids: Tensor  # int64 [B, L], from 0 at each document's start
    seq_idx: Tensor  # int32 [B, L], the document's number in its row, never falling along the row
    cu_seqlens: Tensor  # int32 [documents + 1], their bounds over the flattened B·L tokens; rows begin documents
    max_seqlen: int  # tokens of the longest document
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives: made for the first layer that asks for `key`, the same for those after it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def to(self, device: torch.device | str | int) -> "Documents":
        """The same on `device`, as a model that is spread over several hands it to its layers; made once for each."""
        device = torch.device(device)
        if device == self.seq_idx.device:
            return self
        names = ("position_ids", "seq_idx", "cu_seqlens")
        return self.once(
            device, lambda: replace(self, _made={}, **{name: getattr(self, name).to(device) for name in names})
        )

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return self.cu_seqlens.tolist()

    @classmethod
    def whole_rows(cls, rows: int, length: int, device: torch.device | str) -> "Documents":
        """Every row is one document."""
        return cls.from_seq_idx(torch.zeros(rows, length, dtype=torch.int32, device=device))

    @classmethod
    def from_mask(cls, mask: Tensor, resuming: Tensor | None = None) -> "Documents":
        """Documents of rows padded on either side.

        Args:
            mask: [B, L], bool or integer; true where the token is real.
            resuming: bool [B or 1, L - 1], whether a token but the first is of the document of the one before it, where
                both are real; None: it is.
        """
        mask = mask.bool()
        changed = torch.zeros_like(mask)
        changed[:, 1:] = mask[:, 1:] != mask[:, :-1]
        if resuming is not None:
            changed[:, 1:] |= ~resuming & mask[:, 1:] & mask[:, :-1]
        return cls.from_seq_idx(changed.cumsum(1).int())

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> "Documents":
        """Documents from each token's document number, int32 [B, L], never falling along a row."""
        B, L = seq_idx.shape
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        index = torch.arange(L, device=seq_idx.device).expand(B, L)
        position_ids = index - torch.where(starts, index, 0).cummax(1).values
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([B * L], device=seq_idx.device)])
        return cls(position_ids, seq_idx, cu_seqlens.int(), int(cu_seqlens.diff().max()))

    @classmethod
    def behind(cls, document: Tensor, position: Tensor, mask: Tensor) -> "Documents":
        """Documents of new tokens behind others of the same rows.

        Args:
            document: int32 [B], of each row's last token before them. position: int64 [B], the next one in it.
            mask: [B, 1 + L], bool or integer; true where that last token and the new ones are real.
        """
        numbers = document[:, None] + cls.from_mask(mask).seq_idx[:, 1:]
        new = cls.from_seq_idx(numbers)
        before = torch.where(numbers == document[:, None], position[:, None], 0)
        return replace(new, position_ids=new.position_ids + before)

    def last(self, tokens: int) -> "Documents":
        """The same documents seen by the last `tokens` tokens of each row only; positions go on counting."""
        if tokens == self.seq_idx.shape[1]:
            return self
        tail = Documents.from_seq_idx(self.seq_idx[:, -tokens:])
        return Documents(self.position_ids[:, -tokens:], tail.seq_idx, tail.cu_seqlens, tail.max_seqlen)


def to_device(batch: Any, device: torch.device | str) -> tuple[Tensor, Tensor, Documents]:
    """A batch of numpy arrays (`input_ids`, `labels` and the fields of `Documents`) as tensors on `device`."""

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    documents = Documents(tensor(batch.position_ids), tensor(batch.seq_idx), tensor(batch.cu_seqlens), batch.max_seqlen)
    return tensor(batch.input_ids), tensor(batch.labels), documents
