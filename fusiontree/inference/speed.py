"""Measurement of a model's prefill and decoding speed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusiontree.device import elapsed, memory_figures, oom_context, reset_memory, timing_summary
from fusiontree.errors import RunError
from fusiontree.inference.decoder import Decoder
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM

UNTIMED_STEPS = 4  # before the timed ones: the first steps compile, then capture the CUDA graph


def measure_decoding(
    model: HybridLM, rows: int, context: int, steps: int, prefills: int = 1, prompt: np.ndarray | None = None
) -> dict[str, Any]:
    """Measure `prefills` prefills of `rows` prompts of `context` tokens and `steps` decoding steps after the last one.

    Args:
        prompt: int64 [context], used for every row; None: random tokens.

    Returns:
        Median tokens/s of prefill and decoding over all rows, times of the first token and of a step, bytes of the
        cache and peak memory; if memory is exhausted, only the error (`problem`).
    """
    device = model.embedding.weight.device
    reset_memory(device)
    try:
        with oom_context(f"{rows} rows of {context} tokens"):
            first_seconds, step_seconds, cache_bytes = _run(model, rows, context, steps, prefills, prompt)
    except RunError as error:
        return {"problem": str(error)}
    first, spread = timing_summary(first_seconds), timing_summary(step_seconds)
    return {
        "prefill_tokens_per_s": rows * context / first["median_seconds"],
        "tokens_per_s": rows / spread["median_seconds"],
        "first_token": first,
        "step": spread,
        "cache_bytes": cache_bytes,
        **memory_figures(device),
    }


def _run(
    model: HybridLM, rows: int, context: int, steps: int, prefills: int, prompt: np.ndarray | None
) -> tuple[list[float], list[float], int]:
    """Return seconds of each prefill after an untimed one, seconds of each step, and bytes of the cache."""
    device = model.embedding.weight.device
    if prompt is None:
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (rows, context), generator=generator, device=device)
    else:
        ids = torch.from_numpy(prompt).to(device).expand(rows, -1)
    room = context + UNTIMED_STEPS + steps
    logits: list[Tensor] = []
    decoder = Decoder(model, rows, room)
    decoder.prefill(ids)  # compiles and tunes
    first = []
    for _ in range(prefills):
        del decoder  # frees its cache before the next one is allocated
        decoder = Decoder(model, rows, room)
        logits.clear()
        first.append(elapsed(device, lambda: logits.append(decoder.prefill(ids))))  # noqa: B023 - called at once

    def step() -> None:
        logits[0] = decoder.step(logits[0].argmax(-1))

    for _ in range(UNTIMED_STEPS):
        step()
    seconds = [elapsed(device, step) for _ in range(steps)]
    return first, seconds, tensor_bytes(decoder.cache)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of storage of all tensors in `value`, its attributes, lists and mappings; shared ones once."""
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
