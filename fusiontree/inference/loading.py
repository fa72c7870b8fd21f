"""Reading of exported folders: facts, configuration, model and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tokenizers import Tokenizer

from fusiontree.checkpoint.tensor_files import from_safetensors
from fusiontree.data.tokenizer import open_tokenizer
from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.kernels import choose_kernels
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.model.mamba import STATE_PARAMETERS
from fusiontree.run.state_files import Count, DamagedError, Stored, read_stored

FACTS = "fusiontree.json"  # facts about the run


def exported_name(name: str) -> str:
    """Return the name in an exported folder of the weight `name` of `HybridLM`."""
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def trained_name(name: str) -> str:
    """Return the name in `HybridLM` of the exported weight `name`."""
    return name.removeprefix("lm_").removeprefix("model.")


class _Facts(Stored):
    """The facts that commands need; there are more."""

    tokenizer_fingerprint: str
    eos_id: Count
    seq_len: Annotated[int, Field(ge=1, lt=2**31)]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the run's facts in an exported folder: `seq_len`, `step`, `tokenizer_fingerprint`, `eos_id` and more.

    Raises:
        UserError: `folder` is not an exported model.
        RunError: the facts are damaged.
    """
    try:
        return read_stored(folder / FACTS, _Facts).model_dump()
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not an exported model; create one with `fusiontree export RUN {folder}`"
        ) from None
    except DamagedError as error:
        raise RunError(f"{folder / FACTS} is damaged ({short_cause(error)}); export the model again") from None


def read_config(folder: Path) -> ModelConfig:
    """Return the model configuration of an exported folder.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return ModelConfig.from_dict(read_stored(folder / "config.json", Stored).model_dump())
    except FileNotFoundError:
        reason = "config.json is missing"
    except (ValueError, TypeError) as error:  # a DamagedError is a ValueError
        reason = f"config.json: {short_cause(error)}"
    raise RunError(f"{folder} is a damaged export ({reason}); export the model again")


def check_positions(config: ModelConfig, tokens: int) -> None:
    """Raise UserError if a document of `tokens` tokens is longer than the learned time encoding's table."""
    if config.srte == "learned" and tokens > config.max_positions:
        raise UserError(
            f"{tokens:,} tokens exceed the learned time encoding's {config.max_positions:,} positions; use fewer tokens"
        )


def check_ids(config: ModelConfig, prompts: Mapping[str, list[int]]) -> None:
    """Raise UserError, with the prompt's name, if a prompt is empty or has a token outside the vocabulary."""
    for name, prompt in prompts.items():
        if not prompt:
            raise UserError(f"{name} has no token; give at least one")
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            last = config.vocab_size - 1
            raise UserError(f"{name}: token {wrong} is out of range; the model's are 0 to {last}")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text`, without added special tokens, as in the training data."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def load_export(
    folder: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[HybridLM, Tokenizer]:
    """Load the model and the tokenizer of an exported folder.

    As in the training data, a special token spelled out in a text is encoded as text, and no token is added to a text.

    Args:
        device: None: CUDA if available, else the CPU.
        dtype: of weights and activations, except the scan's state parameters; None: as exported.

    Raises:
        UserError: `folder` is not an export of this project.
        RunError: it is damaged.
    """
    read_facts(folder)
    shape = read_config(folder)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files = from_safetensors(folder)
        weights = {trained_name(name): files[name].to(device) for name in files}
        if dtype is not None:
            weights = {n: w if n.endswith(STATE_PARAMETERS) else w.to(dtype) for n, w in weights.items()}
        kernels = choose_kernels(device.type, config=shape, dtype=weights["embedding.weight"].dtype)
        with torch.device("meta"):
            model = HybridLM(shape, kernels)
        model.load_state_dict(weights, strict=True, assign=True)
        tokenizer = _open_tokenizer(folder)
    except (UserError, RunError):  # an unavailable kernel is not damage; damaged files already have their message
        raise
    except Exception as error:  # of torch: names or shapes of weights that do not fit
        raise RunError(f"{folder} is a damaged export ({short_cause(error)}); export the model again") from None
    return model.eval(), tokenizer


def _open_tokenizer(folder: Path) -> Tokenizer:
    try:
        return open_tokenizer(folder)
    except UserError as error:
        reason, *_ = str(error).split(";")  # without the remedy, which is one for a build
        raise RunError(f"{folder} is a damaged export ({reason}); export the model again") from None
