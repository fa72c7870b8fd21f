"""The norm of the whole gradient: what it clips, and what is not updated where it is not finite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusiontree.config import OptimizerConfig
from fusiontree.distributed import collectives
from fusiontree.zero.engine import base_optimizer, gradient_shards, overflowed, skip_step


def is_fused(config: OptimizerConfig, zero: Mapping[str, Any]) -> bool:
    """Whether `FusedClipping` serves: torch's fused AdamW, and gradients that ZeRO (`zero`) leaves on the device."""
    return config.kind == "adamw" and zero.get("stage", 0) <= 2 and "offload_optimizer" not in zero


class FusedClipping:
    """Clips and skips inside the kernel of torch's AdamW: no wait for the device, no pass over the gradients."""

    def __init__(self, engine: Any, limit: float):
        """`limit`: greatest norm of the whole gradient; 0 never clips."""
        self.engine, self.limit = engine, limit
        self.partitioned = engine.zero_optimization_stage() > 0
        self.adam: Any = base_optimizer(engine)

    def prepare(self) -> Tensor:
        """Tell the optimizer what to divide by and whether to do anything; all ranks, after the last backward pass.

        Returns:
            fp32 (), 1 where the gradient is not finite: the step then leaves weights and moments as they are.
        """
        self.norm = torch.nn.utils.get_total_norm(list(gradient_shards(self.engine)))
        if self.partitioned:
            self.norm = collectives.sum_over_ranks(self.norm.square()).sqrt()
        self.adam.grad_scale = (self.norm / self.limit).clamp(min=1.0) if self.limit else torch.ones_like(self.norm)
        self.adam.found_inf = (~torch.isfinite(self.norm)).float()
        return self.adam.found_inf

    def step(self) -> None:
        """The engine's step."""
        self.engine.step()

    def outcome(self, broken: bool) -> tuple[Tensor, bool]:
        """The norm before clipping, fp32 (), and whether the step was left out, which is what `prepare` gave."""
        return self.norm, broken


class EngineClipping:
    """DeepSpeed clips and skips, in its own step: in an fp64 copy of the gradient, and waiting for the device."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.norm: Tensor | None = None  # where DeepSpeed tells none

    def prepare(self) -> Tensor:
        """As in `FusedClipping`; where only the step itself will tell, 0."""
        self.broken = torch.zeros((), device=self.engine.device)
        if self.engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self.norm = torch.nn.utils.get_total_norm(gradients)
            self.broken = (~torch.isfinite(self.norm)).float()
        return self.broken

    def step(self) -> None:
        """The engine's step; without ZeRO it would not look whether the gradient is finite."""
        if self.norm is None or not self.broken.item():
            self.engine.step()
            return
        skip_step(self.engine)

    def outcome(self, broken: bool) -> tuple[Tensor | float, bool]:
        """As in `FusedClipping`, after `step`."""
        if self.norm is not None:
            return self.norm, broken
        return self.engine.get_global_grad_norm(), overflowed(self.engine)
