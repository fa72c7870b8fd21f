"""Clip by the global gradient norm; skip updates whose norm is not finite.

Both classes have the same three methods, called in this order after an update's last backward pass: `prepare`, `step`,
`result`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusiontree.config import OptimizerConfig
from fusiontree.distributed import collectives
from fusiontree.training.norms import total_norm
from fusiontree.zero.engine import base_optimizer, gradient_shards, overflowed, skip_step
from fusiontree.zero.settings import offloads


def is_fused(config: OptimizerConfig, zero: Mapping[str, Any]) -> bool:
    """Return whether `FusedClipping` applies: AdamW, and ZeRO settings (`zero`) that keep gradients on the device."""
    return config.kind == "adamw" and not offloads(zero)


class FusedClipping:
    """Clipping and skipping in the kernel of torch's fused AdamW.

    The kernel divides gradients by `grad_scale` and does nothing where `found_inf` is 1, the two
    attributes of `torch.amp.GradScaler`. So the host never waits for the norm, and clipping needs no extra pass.
    """

    def __init__(self, engine: Any, limit: float):
        """`limit`: greatest global gradient norm; 0 disables clipping."""
        self.engine, self.limit = engine, limit
        self.partitioned = engine.zero_optimization_stage() > 0
        self.adam: Any = base_optimizer(engine)

    def prepare(self) -> Tensor:
        """Compute the global norm and set the optimizer's scale and skip flag. Collective.

        Returns:
            fp32 (), 1 if the gradient is not finite: the step then leaves weights and moments unchanged.
        """
        self.norm = total_norm(list(gradient_shards(self.engine)))
        if self.partitioned:
            self.norm = collectives.sum_over_ranks(self.norm.square()).sqrt()
        self.adam.grad_scale = (self.norm / self.limit).clamp(min=1.0) if self.limit else torch.ones_like(self.norm)
        self.adam.found_inf = (~torch.isfinite(self.norm)).float()
        return self.adam.found_inf

    def step(self) -> None:
        """Run the engine's step."""
        self.engine.step()

    def result(self, nonfinite: bool) -> tuple[Tensor, bool]:
        """Return the norm before clipping, fp32 (), and whether the step was skipped.

        Args:
            nonfinite: whether `prepare` returned 1 on some rank.
        """
        return self.norm, nonfinite


class EngineClipping:
    """Clipping and skipping by DeepSpeed's own step, which copies the gradient to fp64 and waits for the device."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.norm: Tensor | None = None  # computed here at ZeRO 0 only, else by DeepSpeed

    def prepare(self) -> Tensor:
        """Return as `FusedClipping.prepare` at ZeRO 0; elsewhere 0, because only the step finds out."""
        self.nonfinite = torch.zeros((), device=self.engine.device)
        if self.engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self.norm = total_norm(gradients)
            self.nonfinite = (~torch.isfinite(self.norm)).float()
        return self.nonfinite

    def step(self) -> None:
        """Run the engine's step; skip it at ZeRO 0 for a non-finite gradient, which DeepSpeed does not check there."""
        if self.norm is None or not self.nonfinite.item():
            self.engine.step()
            return
        skip_step(self.engine)

    def result(self, nonfinite: bool) -> tuple[Tensor | float, bool]:
        """Return as `FusedClipping.result`."""
        if self.norm is not None:
            return self.norm, nonfinite
        return self.engine.get_global_grad_norm(), overflowed(self.engine)
