"""Benchmark of decoding: prefill, single-token steps and the size of the cache."""

from collections.abc import Sequence
from typing import Any

import torch

from fusiontree.bench.train import bench_config
from fusiontree.config import RunConfig
from fusiontree.console import progress_bar
from fusiontree.device import accelerator, default_dtype_and_device, describe_machine, oom_context
from fusiontree.errors import UserError
from fusiontree.inference.loading import check_positions
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding
from fusiontree.kernels import DTYPES, choose_kernels
from fusiontree.model.lm import HybridLM


def bench_decode(
    preset: str, overrides: list[str], batches: Sequence[int], contexts: Sequence[int], steps: int = 32
) -> dict[str, Any]:
    """Measure prefill and decoding of `preset` with random weights, for every batch and context.

    Args:
        preset: its name or a YAML file.
        overrides: ``key=value``, as for a run.
        batches: numbers of rows decoded together.
        contexts: prompt lengths in tokens.
        steps: tokens generated and timed per row.

    Returns:
        The model and the machine, and for each batch and context: tokens/s of prefill and decoding (all rows together,
        median step), the spread of a step, the bytes of the cache and the peak memory, or the reason (`problem`) if
        memory does not suffice.

    Raises:
        UserError: the configuration or a number is wrong.
    """
    for name, values in (("batch", batches), ("context", contexts), ("steps", [steps])):
        if min(values) < 1:
            raise UserError(f"--{name} is {min(values)}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device)
    check_positions(config.model, max(contexts) + UNTIMED_STEPS + steps)
    with oom_context(f"the weights of {config.name}"):
        model = random_model(config, device)
    figures = []
    with progress_bar() as bar:
        task = bar.add_task("decode", total=len(batches) * len(contexts), note="")
        for rows in batches:
            for context in contexts:
                bar.update(task, note=f"{rows} x {context:,} tokens")
                figures.append({"batch": rows, "context": context, **measure_decoding(model, rows, context, steps)})
                bar.update(task, advance=1)
    return {
        "preset": config.name,
        "parameters": config.model.parameter_count(),
        "precision": config.precision,
        **describe_machine(device),
        "kernels": dict(model.kernels.names),
        "steps": steps,
        "decode": figures,
    }


def random_model(config: RunConfig, device: torch.device) -> HybridLM:
    """Return the model with random weights in the precision of its activations; state parameters are fp32."""
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.precision]
    kernels = choose_kernels(device.type, config.kernels.model_dump(), config.model, dtype)
    with default_dtype_and_device(dtype, device):
        model = HybridLM(config.model, kernels)
    return model.eval()
