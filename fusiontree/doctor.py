"""What is here and what a run would make of it: versions, devices, kernels, memory, and whether it can run at all."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig, dataset_manifest, deepspeed_json
from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig

# distribution and module; without the first group nothing runs
_REQUIRED = {"torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "webdataset": "webdataset"}
_OPTIONAL = {
    "triton": "triton",
    "mamba-ssm": "mamba_ssm",
    "flash-attn-4": "flash_attn.cute",
    "flash-attn": "flash_attn",
    "liger-kernel": "liger_kernel",
    "wandb": "wandb",
}
_STATE_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # per parameter: all in fp32, Adam has two moments
_PROCESS_BYTES = 600 * 2**20  # a rank before its model: the interpreter with torch and DeepSpeed


def diagnose(config: RunConfig | None, ranks: int = 1) -> dict[str, Any]:
    """Look at this machine and, if given, at what `config` needs of it on `ranks` ranks.

    Returns:
        versions, machine, kernels (by operation), install (what to add, one line each), problems (why `config`, or
        anything, cannot run here; empty if it can) and, with a configuration, run (its size and memory in bytes).
    """
    problems: list[str] = []
    with contextlib.redirect_stdout(sys.stderr):  # imports that greet: standard output is for the report
        versions = _versions(problems)
    if any(problem.startswith("torch ") for problem in problems):
        return {"versions": versions, "machine": _machine([]), "kernels": {}, "install": [], "problems": problems}
    from fusiontree.distributed import accelerator

    gpus, device_type = _gpus(), accelerator()
    report: dict[str, Any] = {
        "versions": versions,
        "machine": _machine(gpus),
        "kernels": _kernels(config, device_type, problems),
        "install": _advice(versions, device_type, config),
    }
    if config is not None:
        report["run"] = _estimate(config, ranks)
        problems += _run_problems(config, ranks, report["run"], gpus if device_type == "cuda" else [])
    return report | {"problems": list(dict.fromkeys(problems))}


def _versions(problems: list[str]) -> dict[str, str]:
    """Version of each package, or why it cannot be used; a required one that cannot is a problem."""
    versions = {"python": platform.python_version()}
    for name, module in {**_REQUIRED, **_OPTIONAL}.items():
        versions[name], usable = _try_import(name, module)
        if name in _REQUIRED and not usable:
            problems.append(f"{name} is {versions[name]}; install it with `pip install fusiontree`")
    return versions


def _try_import(name: str, module: str) -> tuple[str, bool]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", False
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled packages raise anything: RuntimeError for a missing library, OSError, ...
        return f"{version}, broken: {type(error).__name__}: {' '.join(str(error).split())}", False
    return version, True


def _gpus() -> list[dict[str, Any]]:
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": found.name, "memory_bytes": found.total_memory} for found in properties]


def _machine(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory(),
        "gpus": [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in gpus],
    }


def _memory() -> int:
    """Bytes that the processes here may use: the machine's, or the container's share of them."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return machine if text == "max" else min(machine, int(text))


def _kernels(config: RunConfig | None, device_type: str, problems: list[str]) -> dict[str, dict[str, str]]:
    """By operation: the back-end that will be used and, for the others, why they cannot be."""
    from fusiontree.kernels import DTYPES
    from fusiontree.model import ops

    requested = {} if config is None else config.kernels.model_dump()
    fit = () if config is None else (config.model, DTYPES[config.precision])
    chosen = {}
    for op in ops.OPS:
        try:
            uses = ops.choose(op, requested.get(op, "auto"), device_type, *fit)
        except ValueError as error:
            problems.append(str(error))
            uses = "none"
        reasons = ops.available(op, device_type, *fit)
        chosen[op] = {"uses": uses, **{name: reason or "can run" for name, reason in reasons.items() if name != uses}}
    return chosen


def _advice(versions: dict[str, str], device_type: str, config: RunConfig | None) -> list[str]:
    missing = [name for name in ("mamba-ssm", "liger-kernel") if versions[name] == "not installed"]
    if versions["flash-attn"] == versions["flash-attn-4"] == "not installed":
        missing.append("flash-attn-4 or flash-attn")
    advice = []
    if device_type == "cuda" and missing:
        advice.append(f"pip install 'fusiontree[cuda]': faster kernels ({', '.join(missing)})")
    if config is not None and config.logging.wandb and versions["wandb"] == "not installed":
        advice.append("pip install 'fusiontree[wandb]': logging.wandb is true")
    return advice


def _estimate(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Size of the run and the memory that one of `ranks` ranks needs, estimated to about a factor of 1.5."""
    parameters = config.model.parameter_count()
    activations = _activation_bytes(config)
    report: dict[str, Any] = {"parameters": parameters, "ranks": ranks}
    return report | _or_unknown(
        lambda: {
            "state_bytes": (state := _state_bytes(parameters, deepspeed_json(config), ranks)),
            "activation_bytes": activations,
            "memory_per_rank_bytes": state + activations + _PROCESS_BYTES,
        }
    )


def _or_unknown(figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or none where the DeepSpeed settings cannot be read, which is reported among the problems."""
    try:
        return figures()
    except UserError:
        return {}


def _state_bytes(parameters: int, settings: dict[str, Any], ranks: int) -> int:
    """Weights, gradients and moments of one rank; ZeRO shares out the moments, then gradients, then weights."""
    zero = settings.get("zero_optimization", {})
    shared = ("optimizer", "gradients", "weights")[: zero.get("stage", 0)]
    kept_here = [what for what in _STATE_BYTES if not (what == "optimizer" and "offload_optimizer" in zero)]
    return sum(parameters * _STATE_BYTES[what] // (ranks if what in shared else 1) for what in kept_here)


def _activation_bytes(config: RunConfig) -> int:
    """What one forward pass keeps for the backward pass, and the block that is recomputed."""
    model, tokens = config.model, config.data.seq_len * config.batch.micro_rows
    item = 2 if config.precision == "bf16" else 4
    block = max(_block_width(model, layer) for layer in range(model.num_layers)) * item
    return tokens * (block + sum(_kept_bytes(config, layer, item) for layer in range(model.num_layers)))


def _kept_bytes(config: RunConfig, layer: int, item: int) -> int:
    """Bytes per token that block `layer` keeps for the backward pass, of `item` bytes a value."""
    model, chosen = config.model, config.activation_checkpointing
    kept = 0 if chosen.offload else 4 * model.hidden_size  # of a part that is computed again: its input
    if chosen.policy == "full" or (chosen.policy == "every_n" and layer % chosen.every == 0):
        return kept
    block = _block_width(model, layer) * item
    if chosen.policy != "branch":
        return block
    widths = {"mamba": _mamba_width(model, layer), "attention": _attention_width(model, layer)}
    again = widths if chosen.branch == "both" else [chosen.branch]
    return block + sum(kept - widths[branch] * item for branch in again if widths[branch])


def _block_width(model: ModelConfig, layer: int) -> int:
    """Values per token that one block keeps: its branches' projections, the MLP's, norms and the gate."""
    branches = _mamba_width(model, layer) + _attention_width(model, layer)
    return branches + 4 * model.mlp_size + 12 * model.hidden_size


def _mamba_width(model: ModelConfig, layer: int) -> int:
    return 2 * model.ssm_projection_size if model.has("mamba", layer) else 0


def _attention_width(model: ModelConfig, layer: int) -> int:
    return 2 * (model.queries_per_kv + 1) * sum(model.kv_heads_at(layer)) * model.head_dim


def _run_problems(config: RunConfig, ranks: int, run: dict[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    """Why `config` cannot run on `ranks` ranks here."""
    checks: list[Callable[[], Any]] = [
        lambda: deepspeed_json(config),
        lambda: dataset_manifest(config),
        lambda: config.accumulation_steps(ranks),
        lambda: _check_devices(config, ranks, gpus),
        lambda: _check_memory(run, ranks, gpus),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_devices(config: RunConfig, ranks: int, gpus: list[dict[str, Any]]) -> None:
    import torch

    if gpus and ranks > len(gpus):
        raise UserError(f"{ranks} ranks need {ranks} GPUs, here are {len(gpus)}; start fewer ranks")
    if gpus and config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision bf16 is not supported by {gpus[0]['name']}; set precision=fp32")


def _check_memory(run: dict[str, Any], ranks: int, gpus: list[dict[str, Any]]) -> None:
    if "memory_per_rank_bytes" not in run:
        return
    needed = run["memory_per_rank_bytes"] * (1 if gpus else ranks)
    here = min(gpu["memory_bytes"] for gpu in gpus) if gpus else _memory()
    if needed > here:
        whose = f"a rank on {gpus[0]['name']}" if gpus else f"{ranks} rank{'s' * (ranks > 1)} on this machine"
        raise UserError(
            f"about {needed / 2**30:.1f} GiB needed by {whose}, {here / 2**30:.1f} GiB there; lower batch.micro_rows "
            "or data.seq_len, set activation_checkpointing=full, a higher ZeRO stage, or take a smaller preset"
        )
