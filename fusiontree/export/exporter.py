"""Export of a checkpoint to a Hugging Face folder, proven equal to the trained model before it appears."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree import __version__
from fusiontree.checkpoint import store
from fusiontree.checkpoint.tensor_files import Spec, write_safetensors
from fusiontree.config import RunConfig, load_config
from fusiontree.console import console, progress_bar
from fusiontree.data.format import tokenizer_fingerprint
from fusiontree.errors import RunError, UserError
from fusiontree.export.model_card import model_card
from fusiontree.export.options import ExportOptions
from fusiontree.export.parity import prove
from fusiontree.export.tokenizer import prove_tokenizer, write_tokenizer
from fusiontree.files import refuse_existing, staged_folder, write_atomic
from fusiontree.inference.loading import FACTS, exported_name, trained_name
from fusiontree.kernels import DTYPES
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.model.mamba import STATE_PARAMETERS
from fusiontree.prune.plan import PrunedWeights
from fusiontree.prune.pruner import Pruner
from fusiontree.run.folder import CONFIG_FILE, TOKENIZER, run_of
from fusiontree.run.records import iter_metrics


def export(source: Path, output: Path, options: ExportOptions | None = None) -> dict[str, Any]:
    """Export a checkpoint, or the newest one of a run, to `output`, for any ZeRO stage and number of ranks.

    The folder loads with ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` where this project
    is not installed. It appears only if its token ids and logits equal those of training (`parity.json`). Peak memory
    is the embedding and one tensor. Pruning is the exception: it loads the complete model to measure it.

    Args:
        source: a run's folder or a checkpoint's.
        options: None: the defaults.

    Returns:
        Output path, checkpoint, step, parameters, bytes of the weights, parity figures and the pruning report.

    Raises:
        UserError: no checkpoint, one that is not only tensors, an invalid option, or `output` is not empty.
        RunError: a damaged checkpoint, or failed parity.
    """
    options = options or ExportOptions()
    dtype = options.dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    max_shard_bytes = options.max_shard_bytes  # raises UserError
    refuse_existing(output, options.overwrite, marker=FACTS)
    with contextlib.ExitStack() as pins:
        return _export(store.resolve(source, pins), output, options, max_shard_bytes, pins)


def _export(
    checkpoint: Path, output: Path, options: ExportOptions, max_shard_bytes: int, pins: contextlib.ExitStack
) -> dict[str, Any]:
    """Export `checkpoint`, which `pins` keeps; see `export`."""
    dtype = options.dtype
    config = load_config(str(checkpoint / CONFIG_FILE))
    state = store.read_state(checkpoint)
    tokenizer = run_of(checkpoint) / TOKENIZER
    if not tokenizer.is_dir():
        raise UserError(f"no tokenizer at {tokenizer}; copy the tokenizer of the training data there")
    if tokenizer_fingerprint(tokenizer) != state["tokenizer_fingerprint"]:
        raise UserError(f"{tokenizer} is not the run's tokenizer; copy the tokenizer of the training data there")
    stored = store.read_weights(checkpoint, options.trust)
    with torch.device("meta"):
        misfit = stored.misfit(HybridLM(config.model))
    if misfit is not None:
        raise RunError(f"{checkpoint}: its weights do not match its {CONFIG_FILE} ({misfit}); use another checkpoint")
    weights: Mapping[str, Tensor] = stored
    shape, pruned = config.model, {}
    if options.prune is not None or options.prune_heads:
        pruner = Pruner(checkpoint, config, weights, options.data, options.limit)
        pruning, report = pruner.prune(options.prune, options.prune_heads)
        gates = store.read_gates(checkpoint, config.model)
        shape, weights = pruning.apply(config.model), PrunedWeights(weights, config.model, pruning, gates)
        for when, model in (("before", config.model), ("after", shape)):
            report[when]["weights_bytes"] = sum(spec.size for spec in _specs(model, dtype).values())
        pruned["pruning"] = report
    with staged_folder(output, options.overwrite, marker=FACTS) as partial:
        _write_weights(partial, shape, weights, dtype, max_shard_bytes)
        facts = {**state, "val_loss": _held_out_loss(run_of(checkpoint), state["step"]), **pruned}
        _write_other_files(partial, config, shape, facts, tokenizer, dtype)
        console.print("checking parity: token ids, logits and cached decoding against the trained model")
        parity = {"tokenizer": prove_tokenizer(tokenizer, partial), **prove(partial, shape, weights, dtype)}
        write_atomic(partial / "parity.json", json.dumps(parity, indent=1))
        pins.close()  # raises RunError if the run has replaced the checkpoint
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    return {
        "output": str(output),
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "dtype": dtype,
        "parameters": shape.parameter_count(),
        "weights_bytes": size,
        "parity": parity,
        **pruned,
    }


def _held_out_loss(run: Path, step: int) -> float | None:
    """Return the run's last held-out loss up to `step`, nats per token; None: not measured."""
    known = [line["val_loss"] for line in iter_metrics(run) if "val_loss" in line and line["step"] <= step]
    return known[-1] if known else None


def _specs(shape: ModelConfig, dtype: str) -> dict[str, Spec]:
    """Return the exported tensors' shapes and dtypes for a model of `shape`, by exported name."""
    with torch.device("meta"):
        model = HybridLM(shape)
    specs = {}
    for name, parameter in model.named_parameters():
        kept = name.endswith(STATE_PARAMETERS)
        specs[exported_name(name)] = Spec(tuple(parameter.shape), torch.float32 if kept else DTYPES[dtype])
    return specs


def _write_weights(
    folder: Path, shape: ModelConfig, weights: Mapping[str, Tensor], dtype: str, max_shard_bytes: int
) -> None:
    """Write the weights of a model of `shape` under their exported names."""
    specs = _specs(shape, dtype)

    def read(name: str) -> Tensor:
        return weights[trained_name(name)]

    with progress_bar() as bar:
        task = bar.add_task("export", total=len(specs), note="")
        for name in write_safetensors(folder, read, specs, max_shard_bytes):
            bar.update(task, advance=1, note=name)


def _write_other_files(
    folder: Path, config: RunConfig, shape: ModelConfig, state: dict[str, Any], tokenizer: Path, dtype: str
) -> None:
    """Write configuration, modelling code, tokenizer, generation defaults, model card and the run's facts."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    from fusiontree.model.hf import AUTO_CLASSES, FusionTreeConfig, FusionTreeForCausalLM

    ends = {"eos_token_id": state["eos_id"], "pad_token_id": state["pad_id"], "bos_token_id": state["eos_id"]}
    settings = FusionTreeConfig(**shape.to_dict(), **ends)
    # `transformers serve` looks this name up in transformers itself; the auto class then finds our class by auto_map
    settings.architectures, settings.dtype = ["AutoModelForCausalLM"], DTYPES[dtype]
    settings.auto_map = {name: f"hf.{model.__name__}" for name, model in AUTO_CLASSES.items()}
    with torch.device("meta"):
        custom_object_save(FusionTreeForCausalLM(settings), folder, settings)  # copies the modelling code
    settings.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    facts = {"fusiontree_version": __version__, "seq_len": config.data.seq_len, "run": config.name, **state}
    write_atomic(folder / FACTS, json.dumps(facts, indent=1))
    write_atomic(folder / "README.md", model_card(config, shape, state))
