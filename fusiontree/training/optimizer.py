"""Which parameters are updated how: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.config import OptimizerConfig
from fusiontree.zero.setup import full_shape, muon_class


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed shares out; each group's `lr` is its peak."""
    groups = parameter_groups(model, config)
    adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, **adam)
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # it compiles what it is made of, for minutes on a CPU
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return muon_class()(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay.

    Norms, biases, the scan's state parameters and the gate are spared the decay. Under Muon (arXiv 2502.16982) the
    matrices of the blocks stand by shape: their rates make an update's root mean square that of AdamW, so that `lr` and
    `weight_decay` mean the same for both.
    """
    muon: dict[tuple[int, ...], list[Tensor]] = {}
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if config.kind == "muon" and is_block_matrix(name):
            muon.setdefault(shape, []).append(parameter)
        else:
            (spared if len(shape) < 2 or ".fusion." in name else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": spared, "lr": config.lr, "weight_decay": 0.0},
    ]
    if config.kind == "adamw":
        return groups
    return [*({**group, "use_muon": False} for group in groups), *(_muon_group(s, p, config) for s, p in muon.items())]


def is_block_matrix(name: str) -> bool:
    """Whether `name` is a projection of a block: not the embedding, a convolution, SRTE, the gate or a vector."""
    return (name.startswith("blocks.") and name.endswith("_proj.weight")) or ".mlp." in name


def _muon_group(shape: tuple[int, ...], parameters: list[Tensor], config: OptimizerConfig) -> dict[str, Any]:
    rows, columns = shape
    rescale = 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns))  # DeepSpeed makes the last
    return {
        "params": parameters,
        "lr": config.lr * rescale,
        "weight_decay": config.weight_decay / rescale,
        "momentum": config.momentum,
        "use_muon": True,
        "ns_method": "gram",
    }
