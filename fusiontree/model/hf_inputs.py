"""Attention masks, position ids and cache of the Hugging Face interface. Axes: B rows, L new tokens, P cached tokens.

A masked token is skipped: a row's results are those of its real tokens alone, and its document continues after the
masked ones. The kernels take padding on the left of a row only, so the model runs rows in that form.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Cache
from .config import ModelConfig


class FusionTreeCache(Cache):
    """The model's cache with the methods that `generate()` and its users call.

    `copy.deepcopy` gives an independent cache, for several continuations of one prompt. The state of the scan cannot go
    back by tokens, so `crop` is refused.
    """

    BY_ROW = (*Cache.BY_ROW, "real_tokens", "last_hidden")
    is_compileable = False
    is_croppable = False

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(config, rows, dtype, device)
        self.real_tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # cached tokens that are not masked
        self.last_hidden = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)  # of the last real token
        self.blank_rows = True  # whether a row may have no real token; known on the host to save a device sync

    def record(self, real: Tensor | None, hidden: Tensor) -> None:
        """Count the new tokens after a forward pass.

        Args:
            real: bool [B, L], tokens that are not masked; None: all.
            hidden: the model's output for these tokens, [B, L, H].
        """
        self.real_tokens += hidden.shape[1] if real is None else real.sum(1)
        self.last_hidden = hidden[:, -1].detach().clone()
        self.blank_rows = real is not None and bool((self.real_tokens == 0).any())

    @property
    def is_linear(self) -> list[bool]:
        """Return false for each layer: its cache is not a state alone, because attention caches keys too."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, masked ones included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> "FusionTreeCache":
        """Select the rows of the chosen beams, int64 [B]."""
        self.select(beam_idx)
        return self

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int64 [new B]."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.select(torch.arange(len(self.real_tokens), device=self.position.device).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError(
            "the cache does not support crop: the scan's state cannot go back; keep a copy.deepcopy of the earlier one"
        )


def given_cache(past_key_values: Any, cache: Any) -> FusionTreeCache | None:
    """Return the cache that a call was given by either name, if any.

    Raises:
        TypeError: it is not this model's.
    """
    cache = past_key_values if cache is None else cache
    if cache is None or isinstance(cache, FusionTreeCache):
        return cache
    raise TypeError(
        f"this model does not support a {type(cache).__name__}; pass none, that of an earlier call or new_cache()"
    )


class NewTokens(NamedTuple):
    """Masks of a call's new tokens: the real ones, and those that start a document."""

    real: Tensor | None  # bool [B, L]; None: all
    starts: Tensor | None  # bool [B, L]; None: the first of an empty row starts one, the others continue theirs

    @classmethod
    def read(
        cls,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: FusionTreeCache | None,
    ) -> "NewTokens":
        """Read the arguments of a call.

        Args:
            tokens: the new tokens, [B, L, ...], in any form.
            attention_mask: [B, P + L], true or 1 where a token is real.
            position_ids: int64 [B or 1, L]; a real token at position 0 starts a document.
            cache: of the earlier tokens.

        Raises:
            ValueError: a shape is wrong, a cached token's mask has changed, or positions do not count tokens.
        """
        (B, L), device = tokens.shape[:2], tokens.device
        past = 0 if cache is None else cache.length
        seen = torch.zeros(B, dtype=torch.int64, device=device) if cache is None else cache.real_tokens.to(device)
        if len(seen) != B:
            raise ValueError(
                f"the input has {B} rows, the cache {len(seen)}; repeat the cache's rows with its "
                "batch_repeat_interleave or select them with batch_select_indices"
            )
        real = starts = None
        if attention_mask is not None:
            if attention_mask.shape != (B, past + L):
                raise ValueError(
                    f"attention_mask has shape {[*attention_mask.shape]}; for {past} cached and {L} new tokens it must "
                    f"be [{B}, {past + L}]"
                )
            mask = attention_mask.to(device).bool()
            if past and not torch.equal(mask[:, :past].sum(1), seen):
                raise ValueError(
                    "attention_mask masks other cached tokens than the calls that cached them; the scan's state cannot "
                    "forget a token, so run the complete rows without this cache"
                )
            real = None if bool(mask[:, past:].all()) else mask[:, past:]
        if position_ids is not None:
            starts = _restarts(B, L, real, position_ids.to(device), past)
        if real is None and starts is None and (cache is None or not past or not cache.blank_rows):
            return cls(None, None)
        visible = torch.ones(B, L, dtype=torch.bool, device=device) if real is None else real
        first = visible & (visible.cumsum(1) == 1) & (seen == 0)[:, None]
        return cls(real, first if starts is None else first | starts)


def _restarts(B: int, L: int, real: Tensor | None, position_ids: Tensor, past: int) -> Tensor | None:
    """Return where real tokens are at position 0, bool [B, L]; None if positions only count up from the first one."""
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != L:
        raise ValueError(f"position_ids has shape {[*position_ids.shape]}; it must be [{B}, {L}] or [1, {L}]")
    counts, zero = position_ids.diff(dim=1) == 1, position_ids == 0
    if bool(counts.all()) and not (past and bool(zero[:, 0].any())):
        return None
    wrong = ~(counts | zero[:, 1:])
    if real is not None:
        wrong, zero = wrong & real[:, 1:] & real[:, :-1], zero & real
    if bool(wrong.any()):
        raise ValueError("position_ids must increase by one within a document and restart at 0 in the next")
    return zero.expand(B, L)


def right_align(real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order that moves each row's masked tokens to its left, and the way back.

    Args:
        real: bool [B, L].

    Returns:
        Two indices for `at`, int64 [B, L] each: the old place of each token in the new order; and the new place of each
        token or, if it is masked, of the last real token before it.
    """
    order = real.long().argsort(dim=1, stable=True)
    back = (~real).sum(1, keepdim=True) + real.cumsum(1) - 1
    return order, back.clamp(min=0)


def at(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index`, int64 [B, n], of each row of x [B, L, ...]: [B, n, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


# there are no segments; the cache counts its tokens itself; `generate` passes its own argument on
_IGNORED = ("token_type_ids", "cache_position", "tokenizer")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # repeat position_ids


def check_arguments(arguments: Mapping[str, Any], packed: bool) -> None:
    """Check the arguments that some models take and this one does not use.

    Args:
        arguments: by name; None and False request nothing, except `is_causal=False`.
        packed: whether position_ids are given, so that other descriptions of the documents are redundant.

    Raises:
        TypeError: an argument would have an effect.
    """
    for name, value in arguments.items():
        if value is None or name in _IGNORED or (packed and name in _PACKING):
            continue
        if value is (name == "is_causal"):  # False requests nothing; attention is causal anyway
            continue
        remedy = "; give position_ids that restart at 0 in each document" if name in _PACKING else ""
        raise TypeError(f"this model does not support the argument {name}{remedy}")
