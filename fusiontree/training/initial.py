"""The weights that a run starts from when they are an exported model's: continued pretraining, healing, longer rows."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusiontree.config import RunConfig
from fusiontree.data.format import Manifest
from fusiontree.errors import RunError, UserError
from fusiontree.exported import PREFIX, read_config, read_facts
from fusiontree.model.config import ModelConfig
from fusiontree.weights import of_safetensors

# fields of the model that its weights have no part in
MAY_DIFFER = ("rope_base", "window", "window_schedule", "chunk_size", "branch_drop")


def check_initial(config: RunConfig, manifest: Manifest) -> None:
    """Raise UserError unless the model that `config.init_from` names, if any, fits the run's model and its data."""
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


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


class Initial:
    """Gives modules of a model their weights from an exported folder, one at a time."""

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self.weights = folder, of_safetensors(folder)
        self.paths = {module: f"{PREFIX}{path}." for path, module in model.named_modules()}

    def give(self, module: nn.Module) -> None:
        """Overwrite the module's own parameters."""
        for own, parameter in module.named_parameters(recurse=False):
            name = self.paths[module] + own
            value: Tensor | None = self.weights.get(name)
            if value is None or value.shape != parameter.shape:
                raise RunError(f"init_from {self.folder}: its weights are not those of its config.json ({name})")
            parameter.data.copy_(value)
