"""Initial weights of a run: random, or those of an exported model (`init_from`).

Uses of `init_from`: continued pretraining, recovery after pruning, extension to longer rows.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusiontree.checkpoint.tensor_files import TensorFiles, from_safetensors
from fusiontree.config import RunConfig
from fusiontree.data.format import Manifest
from fusiontree.errors import RunError, UserError
from fusiontree.inference.loading import exported_name, read_config, read_facts
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM, Initializer, seeded_init

# fields of the model that may differ from the exported model's: they have no weights
MAY_DIFFER = ("rope_base", "window", "window_schedule", "chunk_size", "branch_drop")


def check_init_from(config: RunConfig, manifest: Manifest) -> None:
    """Check the exported model that `config.init_from` names, if any, against the run's model and data.

    Raises:
        UserError: its tokenizer or its shape differs.
        RunError: it is damaged.
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
            f"init_from {folder} has another model shape than the configuration; set {settings} "
            f"(fields that may differ: {', '.join(may_differ)})"
        )
    _open_weights(folder)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def run_initializer(config: RunConfig, device: torch.device, resuming: bool) -> Initializer:
    """Return the initializer of a run's model: zeros when `resuming`, because a checkpoint replaces all weights."""
    if resuming:
        return _zero_init(device)
    return seeded_init(config.seed) if config.init_from is None else _exported_init(config.init_from)


def _zero_init(device: torch.device) -> Initializer:
    def initialize(_: str, module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()

    return initialize


def _exported_init(folder: Path) -> Initializer:
    """Return an initializer that reads each module's weights from an exported folder when the module is made."""
    weights = _open_weights(folder)

    def initialize(name: str, module: nn.Module) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(weights[exported_name(f"{name}.{own}")].to(parameter.dtype, copy=True)))

    return initialize


def _open_weights(folder: Path) -> TensorFiles:
    """Open the weights of an exported folder.

    Raises:
        RunError: a file is damaged, or the weights do not match config.json.
    """
    weights = from_safetensors(folder)
    with torch.device("meta"):
        model = HybridLM(read_config(folder))
    if misfit := weights.misfit(model, exported_name):
        raise RunError(f"init_from {folder}: its weights do not match its config.json ({misfit}); export it again")
    return weights
