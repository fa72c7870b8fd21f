"""Decoding, measured: prompts taken in, tokens made one by one, and what the cache holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusiontree.bench import measure
from fusiontree.bench.train import bench_config
from fusiontree.config import RunConfig
from fusiontree.console import progress_bar
from fusiontree.distributed import accelerator
from fusiontree.errors import RunError, UserError
from fusiontree.generate import Decoder, check_positions
from fusiontree.kernels import DTYPES, choose_kernels
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM

_UNTIMED_STEPS = 4  # before those that are timed: a step is compiled, then captured, then only launched


def bench_decode(
    preset: str, overrides: list[str], batches: Sequence[int], contexts: Sequence[int], steps: int = 32
) -> dict[str, Any]:
    """Measure prefill and decoding of `preset` with random weights, for every batch and context.

    Args:
        preset: its name or a YAML file. overrides: ``key=value``, as for a run.
        batches: rows decoded together. contexts: tokens of each row's prompt.
        steps: tokens that are made, and timed, per row.

    Returns:
        The model and the machine, and for each batch and context: tokens/s of the prefill and of decoding (all rows
        together, the median step), the spread of a step, the cache's bytes and the memory's peak.
        Where memory does not suffice, the line that says so (`problem`).

    Raises:
        UserError: the configuration or a number is wrong.
    """
    for name, values in (("batch", batches), ("context", contexts), ("steps", [steps])):
        if min(values) < 1:
            raise UserError(f"--{name} is {min(values)}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device)
    check_positions(config.model, max(contexts) + _UNTIMED_STEPS + steps)
    with measure.naming_lack_of_memory(f"the weights of {config.name}"):
        model = _model(config, device)
    figures = []
    with progress_bar() as bar:
        task = bar.add_task("decode", total=len(batches) * len(contexts), note="")
        for rows in batches:
            for context in contexts:
                bar.update(task, note=f"{rows} x {context:,} tokens")
                figures.append({"batch": rows, "context": context, **_measure(model, rows, context, steps, device)})
                bar.update(task, advance=1)
    return {
        "preset": config.name,
        "parameters": config.model.parameter_count(),
        "precision": config.precision,
        **measure.describe_machine(device),
        "kernels": dict(model.kernels.names),
        "steps": steps,
        "decode": figures,
    }


def _model(config: RunConfig, device: torch.device) -> HybridLM:
    """The model with random weights in the precision of its activations; the scan's own parameters are fp32 always."""
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.precision]
    kernels = choose_kernels(device.type, config.kernels.model_dump(), config.model, dtype)
    with measure.made_in(dtype, device):
        model = HybridLM(config.model, kernels)
    return model.eval()


def _measure(model: HybridLM, rows: int, context: int, steps: int, device: torch.device) -> dict[str, Any]:
    measure.reset_memory(device)
    try:
        with measure.naming_lack_of_memory(f"{rows} rows of {context} tokens"):
            prefill, step_seconds, cache_bytes = _run(model, rows, context, steps, device)
    except RunError as error:
        return {"problem": str(error)}
    spread = measure.spread(step_seconds)
    return {
        "prefill_tokens_per_s": rows * context / prefill,
        "tokens_per_s": rows / spread["median_seconds"],
        "step": spread,
        "cache_bytes": cache_bytes,
        **measure.peak_memory(device),
    }


def _run(model: HybridLM, rows: int, context: int, steps: int, device: torch.device) -> tuple[float, list[float], int]:
    """Seconds of a prefill, the second of its shape, and of each step behind it, and the cache's bytes."""
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (rows, context), generator=generator, device=device)
    room = context + _UNTIMED_STEPS + steps
    Decoder(model, rows, room).prefill(prompt)  # compiles and tunes
    decoder = Decoder(model, rows, room)
    logits: list[Tensor] = []
    prefill = measure.elapsed(device, lambda: logits.append(decoder.prefill(prompt)))

    def step() -> None:
        logits[0] = decoder.step(logits[0].argmax(-1))

    for _ in range(_UNTIMED_STEPS):
        step()
    seconds = [measure.elapsed(device, step) for _ in range(steps)]
    return prefill, seconds, _held_bytes(decoder.cache)


def _held_bytes(value: Any) -> int:
    """Bytes of memory behind all tensors that `value` holds, in its attributes, lists and mappings."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, ModelConfig, type)):
        yield from _tensors(list(vars(value).values()))
