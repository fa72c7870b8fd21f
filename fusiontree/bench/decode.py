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
from fusiontree.generate import PREFILL_TOKENS, check_positions
from fusiontree.kernels import choose_kernels
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM

_PIECE_TOKENS = 65_536  # of all rows together, that one forward of a prefill takes


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
        together, the median step), the spread of a step, the cache's bytes after the prefill and the memory's peak.
        Where memory does not suffice, the line that says so (`problem`).

    Raises:
        UserError: the configuration or a number is wrong.
    """
    for name, values in (("batch", batches), ("context", contexts), ("steps", [steps])):
        if min(values) < 1:
            raise UserError(f"--{name} is {min(values)}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device)
    check_positions(config.model, max(contexts) + steps + 1)
    model = _model(config, device)
    _run(model, 1, min(min(contexts), PREFILL_TOKENS), 2, device)  # compiles and tunes
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
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    try:
        with torch.device(device):
            model = HybridLM(config.model, choose_kernels(device.type, config.kernels.model_dump()))
    finally:
        torch.set_default_dtype(usual)
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


@torch.inference_mode()
def _run(model: HybridLM, rows: int, context: int, steps: int, device: torch.device) -> tuple[float, list[float], int]:
    """Seconds of the prefill and of each step behind it, and the cache's bytes between the two."""
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (rows, context), generator=generator, device=device)
    session = _Session(model, rows)
    prefill = measure.elapsed(device, lambda: session.take(prompt))
    held = _held_bytes(session.cache)
    session.step()  # makes what the first step alone has to make
    return prefill, [measure.elapsed(device, session.step) for _ in range(steps)], held


class _Session:
    """Greedy decoding as `generate` does it, without the text: the one place here that knows the model's cache."""

    def __init__(self, model: HybridLM, rows: int):
        self.model, self.cache = model, model.new_cache(rows)
        self.piece = max(1, min(PREFILL_TOKENS, _PIECE_TOKENS // rows))

    def take(self, prompt: Tensor) -> None:
        """Take in prompts, int64 [B, L], piece by piece."""
        for piece in prompt.split(self.piece, 1):
            self._forward(piece)

    def step(self) -> None:
        """Make one token of every row."""
        self._forward(self.token)

    def _forward(self, ids: Tensor) -> None:
        logits = self.model(ids, cache=self.cache, keep_logits=1).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)


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
