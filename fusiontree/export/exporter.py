"""From a checkpoint to a folder that Hugging Face tools load, proven equal to the trained model before it appears."""

import json
import re
import shutil
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
from fusiontree.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE
from fusiontree.errors import RunError, UserError
from fusiontree.export.model_card import model_card
from fusiontree.export.parity import prove
from fusiontree.files import refuse_existing, staged_folder, write_atomic
from fusiontree.inference.loading import FACTS, PREFIX
from fusiontree.kernels import DTYPES
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.prune.plan import PrunedWeights
from fusiontree.prune.pruner import Pruner
from fusiontree.run.folder import CONFIG_FILE, TOKENIZER, run_of, step_of
from fusiontree.run.records import read_metrics

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    source: Path,
    output: Path,
    dtype: str = "fp32",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    trust: bool = False,
    prune: str | None = None,
    prune_heads: int = 0,
    data: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Export the newest checkpoint of a run, or a checkpoint, to `output`, whatever ZeRO stage and ranks it is of.

    The folder loads with ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` where this project
    is not installed. It appears only if its logits equal the trained model's (`parity.json`). No more of the model is
    ever in memory than the embedding and the tensor at hand; but what is pruned is measured, which takes all of it.

    Args:
        source: a run's folder or a checkpoint's.
        dtype: `fp32` or `bf16`, of all weights but the scan's state parameters, which stay fp32.
        overwrite: replace what `output` holds.
        max_shard_size: of one file of weights, e.g. `5GB` (10^9 bytes).
        trust: unpickle whatever the checkpoint holds, which may run any code.
        prune: what to prune: a plan's path; `auto`, the plan that `fusiontree prune` would make; or the number of
            branches to prune, those whose loss costs least.
        prune_heads: so many global key-value heads are pruned with their queries, those whose loss costs least.
        data: dataset whose held-out rows measure the loss; by default the run's own.
        limit: of those rows, at most.

    Returns:
        Where, the step, parameters, bytes of the weights, the parity figures, and what pruning did.

    Raises:
        UserError: no checkpoint, one that is not only tensors, or `output` holds something.
        RunError: a damaged checkpoint, or failed parity.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1")
    max_shard_bytes = _size(max_shard_size)
    refuse_existing(output, overwrite, marker=FACTS)
    found = store.resolve(source)
    config = load_config(str(found / CONFIG_FILE))
    state = store.read_state(found)
    tokenizer = run_of(found) / TOKENIZER
    if not tokenizer.is_dir():
        raise UserError(f"no tokenizer at {tokenizer}; copy the one that the data was built with there")
    if tokenizer_fingerprint(tokenizer) != state["tokenizer_fingerprint"]:
        raise UserError(f"{tokenizer} is not the tokenizer that the run was trained with; copy that one there")
    stored = store.read_weights(found, trust)
    with torch.device("meta"):
        misfit = stored.misfit(HybridLM(config.model))
    if misfit is not None:
        raise RunError(f"{found}: its weights are not those of its {CONFIG_FILE} ({misfit}); use another one")
    weights: Mapping[str, Tensor] = stored
    shape, pruned = config.model, {}
    if prune is not None or prune_heads:
        pruning, report = Pruner(found, config, weights, data, limit).prune(prune, prune_heads)
        gates = store.read_gates(found)
        shape, weights = pruning.config(config.model), PrunedWeights(weights, config.model, pruning, gates)
        for when, model in (("before", config.model), ("after", shape)):
            report[when]["weights_bytes"] = sum(spec.size for spec in _specs(model, dtype).values())
        pruned["pruning"] = report
    with staged_folder(output, overwrite, marker=FACTS) as partial:
        _write_weights(partial, shape, weights, dtype, max_shard_bytes)
        facts = {**state, "val_loss": _held_out_loss(found), **pruned}
        _write_rest(partial, config, shape, facts, tokenizer, dtype)
        console.print("proving the export: logits and cached decoding against the trained model")
        parity = prove(partial, shape, weights, dtype)
        write_atomic(partial / "parity.json", json.dumps(parity, indent=1))
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    return {
        "output": str(output),
        "checkpoint": str(found),
        "step": state["step"],
        "dtype": dtype,
        "parameters": shape.parameter_count(),
        "weights_bytes": size,
        "parity": parity,
        **pruned,
    }


def _size(text: str) -> int:
    """Bytes of a size such as 5GB."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMG]B)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}; give a size such as 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def _held_out_loss(found: Path) -> float | None:
    """The last that the run measured until the checkpoint `found`, nats per token; None: none."""
    lines = read_metrics(run_of(found))
    known = [line["val_loss"] for line in lines if "val_loss" in line and line["step"] <= step_of(found)]
    return known[-1] if known else None


def _specs(shape: ModelConfig, dtype: str) -> dict[str, Spec]:
    """The exported tensors of a model of `shape`, by their names there."""
    from fusiontree.model.hf import FusionTreeForCausalLM

    with torch.device("meta"):
        model = HybridLM(shape)
    specs = {}
    for name, parameter in model.named_parameters():
        kept = name.endswith(FusionTreeForCausalLM.FP32_NAMES)
        specs[PREFIX + name] = Spec(tuple(parameter.shape), torch.float32 if kept else DTYPES[dtype])
    return specs


def _write_weights(
    folder: Path, shape: ModelConfig, weights: Mapping[str, Tensor], dtype: str, max_shard_bytes: int
) -> None:
    """The weights of `shape` among `weights`, under the names of the exported model."""
    specs = _specs(shape, dtype)

    def read(name: str) -> Tensor:
        return weights[name.removeprefix(PREFIX)]

    with progress_bar() as bar:
        task = bar.add_task("export", total=len(specs), note="")
        for name in write_safetensors(folder, read, specs, max_shard_bytes):
            bar.update(task, advance=1, note=name)


def _write_rest(
    folder: Path, config: RunConfig, shape: ModelConfig, state: dict[str, Any], tokenizer: Path, dtype: str
) -> None:
    """Configuration, modelling code, tokenizer, generation defaults, model card and the run's facts."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    from fusiontree.model.hf import FusionTreeConfig, FusionTreeForCausalLM

    ends = {"eos_token_id": state["eos_id"], "pad_token_id": state["pad_id"], "bos_token_id": state["eos_id"]}
    settings = FusionTreeConfig(**shape.to_dict(), **ends)
    # `transformers serve` takes from transformers itself the class that is named here; this one finds ours by auto_map
    settings.architectures, settings.dtype = ["AutoModelForCausalLM"], DTYPES[dtype]
    with torch.device("meta"):
        custom_object_save(FusionTreeForCausalLM(settings), folder, settings)  # copies the code that makes the model
    settings.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG):  # a folder of more might hold what takes the place of ours
        shutil.copyfile(tokenizer / name, folder / name)
    facts = {"fusiontree_version": __version__, "seq_len": config.data.seq_len, "run": config.name, **state}
    write_atomic(folder / FACTS, json.dumps(facts, indent=1))
    write_atomic(folder / "README.md", model_card(config, shape, state))
