"""Activation checkpointing: the backward pass recomputes activations instead of storing them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# under ZeRO-3, non-reentrant recomputation would find the weights already released
reentrant_checkpoint = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)


@dataclass(frozen=True)
class Recompute:
    """Policy of activation checkpointing. Gradients are bitwise equal under every policy."""

    every: int = 0  # recompute the first of each `every` blocks; 0: none
    branches: tuple[str, ...] = ()  # recompute these branches in every block
    offload: bool = False  # store the inputs of recomputed parts in host memory
    checkpoint: Callable[..., Any] = reentrant_checkpoint  # runs a function so that it is recomputed

    def block(self, layer: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run block `layer`, recomputed if the policy includes it; see `_recomputed`."""
        included = self.every > 0 and layer % self.every == 0
        return self._recomputed(function, *arguments) if included else function(*arguments)

    def branch(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run branch `name` of a block, recomputed if the policy includes it; see `_recomputed`."""
        return self._recomputed(function, *arguments) if name in self.branches else function(*arguments)

    def _recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function` under checkpointing.

        Args:
            function: a block or a branch.
            arguments: its inputs, of which the first may be offloaded. Tensors that need a gradient must be arguments
                themselves: the reentrant checkpoint does not look into containers.
        """
        if not torch.is_grad_enabled():
            return function(*arguments)
        with _offloaded(arguments[0]) if self.offload else contextlib.nullcontext():
            return self.checkpoint(function, *arguments)


KEEP = Recompute()  # no recomputation: all activations are stored


def _offloaded(kept: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return hooks that let autograd save `kept`, [B, L, H], on the host. Both copies are asynchronous."""

    def pack(saved: Tensor) -> Tensor:
        if saved.data_ptr() != address:  # inputs that all blocks share: one copy on the device is cheaper
            return saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        return host.copy_(saved, non_blocking=True)

    def unpack(saved: Tensor) -> Tensor:
        return saved.to(device, non_blocking=True)

    # the hooks live as long as the graph: a reference to `kept` would keep it in device memory
    address, device = kept.data_ptr(), kept.device
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
