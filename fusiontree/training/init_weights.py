"""The weights that a run starts from: drawn, or an exported model's (continued pretraining, healing, longer rows)."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusiontree.checkpoint.tensor_files import TensorFiles, from_safetensors
from fusiontree.config import RunConfig
from fusiontree.data.format import Manifest
from fusiontree.errors import RunError, UserError
from fusiontree.inference.loading import PREFIX, read_config, read_facts
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM, Initializer, seeded_init

# fields of the model that its weights have no part in
MAY_DIFFER = ("rope_base", "window", "window_schedule", "chunk_size", "branch_drop")


def check_initial(config: RunConfig, manifest: Manifest) -> None:
    """Hold the model that `config.init_from` names, if any, to the run's model and its data.

    Raises:
        UserError: it does not fit. RunError: it is damaged.
    """
    folder = config.init_from
    if folder is None:
        return
    facts, exported = read_facts(folder), read_config(folder)
    manifest.require_tokenizer(facts["tokenizer_fingerprint"], folder)
    may_differ = (*MAY_DIFFER, *(["max_positions"] if config.model.srte != "learned" else []))
    wrong = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in may_differ and getattr(exported, field.name) != getattr(config.model, field.name)
    ]
    if wrong:
        settings = " ".join(f"model.{name}={_yaml(getattr(exported, name))}" for name in wrong)
        raise UserError(
            f"init_from {folder} is another model than the configuration's; set {settings} "
            f"(what may differ: {', '.join(may_differ)})"
        )
    _open_weights(folder)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def run_initializer(config: RunConfig, device: torch.device, resuming: bool) -> Initializer:
    """What gives a run's model its weights: zeros where it `resuming` from a checkpoint, which holds them all."""
    if resuming:
        return _zeros_on(device)
    return seeded_init(config.seed) if config.init_from is None else _exported(config.init_from)


def _zeros_on(device: torch.device) -> Initializer:
    def give(_: str, module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()

    return give


def _exported(folder: Path) -> Initializer:
    """The weights of an exported folder, each read when its module is made."""
    weights = _open_weights(folder)

    def give(name: str, module: nn.Module) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(weights[f"{PREFIX}{name}.{own}"].to(parameter.dtype, copy=True)))

    return give


def _open_weights(folder: Path) -> TensorFiles:
    """The weights of an exported folder.

    Raises:
        RunError: its files are damaged, or not those of its config.json.
    """
    weights = from_safetensors(folder)
    with torch.device("meta"):
        model = HybridLM(read_config(folder))
    if misfit := weights.misfit(model, PREFIX):
        raise RunError(f"init_from {folder}: its weights are not those of its config.json ({misfit})")
    return weights
