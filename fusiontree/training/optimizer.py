"""Optimizers: AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the others."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.config import OptimizerConfig
from fusiontree.zero.setup import full_shape, muon_class


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer for DeepSpeed to partition; each group's `lr` is its peak."""
    groups = parameter_groups(model, config)
    adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, **adam)
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # compiling its iterations takes minutes on a CPU
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return muon_class()(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameters grouped by learning rate and weight decay.

    Norms, biases, the scan's state parameters and the gate have no weight decay. Under Muon (arXiv 2502.16982) the
    blocks' matrices are grouped by shape: a group's learning rate gives its update the root mean square of AdamW's, so
    `lr` and `weight_decay` have the same meaning for both.
    """
    muon: dict[tuple[int, ...], list[Tensor]] = {}
    decay: list[Tensor] = []
    no_decay: list[Tensor] = []
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if config.kind == "muon" and is_block_matrix(name):
            muon.setdefault(shape, []).append(parameter)
        else:
            (no_decay if len(shape) < 2 or ".fusion." in name else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": no_decay, "lr": config.lr, "weight_decay": 0.0},
    ]
    if config.kind == "adamw":
        return groups
    return [*({**group, "use_muon": False} for group in groups), *(_muon_group(s, p, config) for s, p in muon.items())]


def is_block_matrix(name: str) -> bool:
    """Return whether `name` is a matrix that Muon updates: a block's projections and MLP, but not its gate or SRTE."""
    return (name.startswith("blocks.") and name.endswith("_proj.weight")) or ".mlp." in name


def _muon_group(shape: tuple[int, ...], parameters: list[Tensor], config: OptimizerConfig) -> dict[str, Any]:
    rows, columns = shape
    # 0.2 * sqrt(max(rows, columns)) is the paper's factor; DeepSpeed's Muon already multiplies by the divisor
    rescale = 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns))
    return {
        "params": parameters,
        "lr": config.lr * rescale,
        "weight_decay": config.weight_decay / rescale,
        "momentum": config.momentum,
        "use_muon": True,
        "ns_method": "gram",
    }
