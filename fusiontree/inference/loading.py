"""An exported folder as this project reads it: what lies there, its shape, its model."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fusiontree.checkpoint.tensor_files import from_safetensors
from fusiontree.errors import RunError, UserError
from fusiontree.files import parse_json
from fusiontree.kernels import choose_kernels
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.model.mamba import STATE_PARAMETERS

FACTS = "fusiontree.json"  # what the run was
_FACTS = {"tokenizer_fingerprint": str, "eos_id": int, "seq_len": int}  # that are read, and as what
PREFIX = "model."  # of the names of the weights


def read_facts(folder: Path) -> dict[str, Any]:
    """What the run left in the exported folder: `seq_len`, `step`, `tokenizer_fingerprint`, `eos_id` and more."""
    path = folder / FACTS
    if not path.is_file():
        raise UserError(f"{folder} is not an exported model; make one with 'fusiontree export RUN {folder}'")
    try:
        facts = parse_json(path.read_text())
        wrong = [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]
    except (ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); export the model again") from None
    if wrong:
        raise RunError(f"{path} is damaged (it lacks a right {', '.join(wrong)}); export the model again")
    return facts


def read_config(folder: Path) -> ModelConfig:
    """The shape of an exported model."""
    try:
        return ModelConfig.from_dict(parse_json((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder} is a damaged export ({error}); export it again") from None


def check_positions(config: ModelConfig, tokens: int) -> None:
    """Raise UserError if documents of `tokens` tokens are longer than the time encoding's table."""
    if config.srte == "learned" and tokens > config.max_positions:
        raise UserError(f"{tokens:,} tokens are more than the learned time encoding has: {config.max_positions:,}")


def load_export(
    folder: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[HybridLM, Tokenizer]:
    """The model and the tokenizer of an exported folder.

    As in the training data, a special token spelt out in a text is text.

    Args:
        device: where to; None: the best one here.
        dtype: of weights and activations, the scan's own parameters excepted; None: as they were exported.

    Raises:
        UserError: `folder` is not an export of this project. RunError: it is damaged.
    """
    read_facts(folder)
    shape = read_config(folder)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files = from_safetensors(folder)
        weights = {name.removeprefix(PREFIX): files[name].to(device) for name in files}
        if dtype is not None:
            weights = {n: w if n.endswith(STATE_PARAMETERS) else w.to(dtype) for n, w in weights.items()}
        kernels = choose_kernels(device.type, config=shape, dtype=weights["embedding.weight"].dtype)
        with torch.device("meta"):
            model = HybridLM(shape, kernels)
        model.load_state_dict(weights, strict=True, assign=True)
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (UserError, RunError):  # the choice of kernels, which is no damage; damage that is said already
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        reason = " ".join(str(error).split()[:30])
        raise RunError(f"{folder} is a damaged export ({reason}); export it again") from None
    tokenizer.encode_special_tokens = True
    return model.eval(), tokenizer
