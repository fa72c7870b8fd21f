"""Activations that the backward pass computes again instead of finding them kept."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """Which parts of the model keep only their input for the backward pass; gradients are the same to the bit."""

    every: int = 0  # whole blocks: the first of each `every`; 0: none
    branches: tuple[str, ...] = ()  # these branches of every block
    offload: bool = False  # a kept input waits in the host's memory

    def block(self, layer: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """What block `layer` gives for `arguments`, see `_recomputed`."""
        whole = self.every > 0 and layer % self.every == 0
        return self._recomputed(function, *arguments) if whole else function(*arguments)

    def branch(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What branch `name` of a block gives for `arguments`, see `_recomputed`."""
        return self._recomputed(function, *arguments) if name in self.branches else function(*arguments)

    def _recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` gives. What has a gradient must be an argument of its own; the first is the input to keep."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        with _offloaded(arguments[0]) if self.offload else contextlib.nullcontext():
            # reentrant: under DeepSpeed's ZeRO-3 the other kind meets weights that have been released again
            return checkpoint(function, *arguments, use_reentrant=True, preserve_rng_state=False)


KEEP = Recompute()  # nothing: all that the backward pass needs is kept


def _offloaded(kept: Tensor) -> contextlib.AbstractContextManager[None]:
    """Where autograd saves `kept`, [B, L, H], save a copy on the host. Neither way waits for the device."""

    def pack(saved: Tensor) -> Tensor:
        if saved.data_ptr() != place:  # shared by all blocks: one copy on the device is the cheaper one
            return saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        return host.copy_(saved, non_blocking=True)

    def unpack(saved: Tensor) -> Tensor:
        return saved.to(device, non_blocking=True)

    place, device = kept.data_ptr(), kept.device  # the hooks live as long as the graph, and must not hold `kept`
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
