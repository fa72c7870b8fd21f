"""Benchmark of pruning: prefill, decoding and memory of the complete and the pruned model in one process."""

import itertools
from typing import Any

import torch

from fusiontree.bench.decode import random_model
from fusiontree.bench.train import bench_config
from fusiontree.device import accelerator, describe_machine, oom_context
from fusiontree.errors import UserError
from fusiontree.inference.loading import check_positions
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding
from fusiontree.model.config import LayerKind, ModelConfig
from fusiontree.paths import local_path
from fusiontree.prune.plan import Pruning, pruned_model, read_plan

PREFILLS = 5  # timed prefills, after one that compiles and tunes
# branches that layers 1, 3, 5, ... keep, in turn
HALVES: dict[str, tuple[LayerKind, ...]] = {
    "mamba": ("mamba",),
    "attention": ("attention",),
    "alternate": ("mamba", "attention"),
}


def bench_prune(
    preset: str,
    overrides: list[str],
    batch: int = 1,
    context: int = 32_768,
    steps: int = 64,
    keep: str = "alternate",
    prefills: int = PREFILLS,
) -> dict[str, Any]:
    """Measure `preset` with random weights, complete and with layers pruned to one branch.

    The gain depends on which branches go: the cache of attention grows with the prompt, that of Mamba does not.

    Args:
        preset: its name or a YAML file.
        overrides: ``key=value``, as for a run.
        batch: rows decoded together.
        context: prompt length in tokens.
        steps: tokens generated and timed per row.
        keep: branch that layers 1, 3, 5, ... keep, one of `HALVES`; or the path of a pruning plan.
        prefills: timed prefills of each model.

    Returns:
        The machine, the kinds of the layers, the figures of both models (see `measure_decoding`) and the ratios of
        pruned to complete: tokens/s of decoding and prefill, peak memory (on a CPU: weights plus cache).

    Raises:
        UserError: a number is out of range, or the plan does not fit the model.
    """
    for name, value in (("batch", batch), ("context", context), ("steps", steps), ("prefills", prefills)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device)
    check_positions(config.model, context + UNTIMED_STEPS + steps)
    pruning = half_pruned(config.model, keep) if keep in HALVES else read_plan(local_path(keep), config.model)
    with oom_context(f"the weights of {config.name}"):
        model = random_model(config, device)
    figures = {}
    for name in ("whole", "pruned"):
        if name == "pruned":
            # both models share the kept weights; the others are freed with the complete model
            weights, kernels = dict(model.named_parameters()), model.kernels
            gates = torch.full((config.model.num_layers, config.model.hidden_size), 0.5, device=device)
            model = pruned_model(weights, config.model, pruning, gates, kernels)
            del weights
        figures[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            **measure_decoding(model, batch, context, steps, prefills),
        }
    return {
        "preset": config.name,
        "precision": config.precision,
        **describe_machine(device),
        "kernels": dict(model.kernels.names),
        "batch": batch,
        "context": context,
        "prefills": prefills,
        "keep": keep,
        "layers": list(pruning.kinds),
        **figures,
        "ratios": _ratios(figures["whole"], figures["pruned"]),
    }


def half_pruned(config: ModelConfig, keep: str = "alternate") -> Pruning:
    """Return a pruning of every second layer to one branch; `keep` is one of `HALVES`."""
    turns = itertools.cycle(HALVES[keep])
    pruning = Pruning.none(config)
    for layer, kind in zip(range(1, config.num_layers, 2), turns, strict=False):
        pruning = pruning.replace(layer, kind)
    return pruning


def _ratios(whole: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    if "problem" in whole or "problem" in pruned:
        return {}

    def memory(figures: dict[str, Any]) -> float:
        return figures["peak_memory_bytes"] or figures["weights_bytes"] + figures["cache_bytes"]

    return {
        "decode": pruned["tokens_per_s"] / whole["tokens_per_s"],
        "prefill": pruned["prefill_tokens_per_s"] / whole["prefill_tokens_per_s"],
        "memory": memory(pruned) / memory(whole),
    }
