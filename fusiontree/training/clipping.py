"""Clipping and skipping inside the optimizer's own kernel: no wait for the device, no pass over the gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusiontree import distributed
from fusiontree.config import OptimizerConfig


def is_fused(config: OptimizerConfig, zero: Mapping[str, Any]) -> bool:
    """Whether `FusedClipping` serves: torch's fused AdamW, and gradients that ZeRO (`zero`) leaves on the device.

    Elsewhere DeepSpeed clips: in an fp64 copy, with two waits for the device.
    """
    return config.kind == "adamw" and zero.get("stage", 0) <= 2 and "offload_optimizer" not in zero


class FusedClipping:
    """Sets, before each update, what the kernel of torch's AdamW divides gradients by, and whether it does anything."""

    def __init__(self, engine: Any, limit: float):
        """`limit`: greatest norm of the whole gradient; 0 never clips."""
        self.engine, self.limit = engine, limit
        self.partitioned = engine.zero_optimization_stage() > 0
        self.adam: Any = engine.optimizer.optimizer if self.partitioned else engine.optimizer

    def prepare(self) -> Tensor:
        """The norm of the whole gradient before it is clipped, fp32 (); all ranks call it after the last backward pass.

        Where it is not finite the update that follows leaves weights and moments as they are.
        """
        norm = torch.nn.utils.get_total_norm(list(self._gradients()))
        if self.partitioned:
            norm = distributed.sum_over_ranks(norm.square()).sqrt()
        self.adam.grad_scale = (norm / self.limit).clamp(min=1.0) if self.limit else torch.ones_like(norm)
        self.adam.found_inf = (~torch.isfinite(norm)).float()
        return norm

    def _gradients(self) -> Iterator[Tensor]:
        """This rank's part of the mean gradient at ZeRO 1 and 2, all of it without ZeRO."""
        if self.partitioned:
            for group in self.engine.optimizer.averaged_gradients.values():
                yield from group
            return
        for group in self.adam.param_groups:
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)
