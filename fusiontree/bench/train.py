"""Training, measured: the engine of a real run on made-up rows, and the models that others train."""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusiontree.bench import rows
from fusiontree.bench.peers import Peer, check_peer
from fusiontree.bench.profiling import profile_step
from fusiontree.config import RunConfig, load_config
from fusiontree.console import console, progress_bar
from fusiontree.data.batch import Batch
from fusiontree.device import (
    accelerator,
    describe_machine,
    device_name,
    elapsed,
    memory_figures,
    oom_context,
    peak_flops,
    reset_memory,
    timing_summary,
)
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError
from fusiontree.model.flops import six_n_flops, update_flops
from fusiontree.training.step import TrainingStep


@dataclass(frozen=True)
class Workload:
    """What is measured, and on which rows.

    Raises:
        UserError: a number is out of its range.
    """

    documents: rows.Documents = "packed"
    steps: int = 10  # that are timed
    warmup: int = 3  # before them: compilation, autotuning, the allocator

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {least}")


def bench_train(
    preset: str,
    overrides: list[str],
    workload: Workload,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    recompute: str = "none",
    peer: str | None = None,
    peer_recompute: bool = True,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Measure optimizer updates of `preset` on one device and, beside it, those of a `peer`.

    Args:
        preset: its name or a YAML file. overrides: ``key=value``, as for a run.
        seq_len: tokens per row; None for the preset's. batch_tokens: per update; None for one row.
        recompute: `activation_checkpointing`.
        peer: one of `peers.PEERS`. peer_recompute: whether it computes its activations again.
        profile: file for the report on where the time of a step goes.

    Returns:
        Throughput, step time, model FLOPs and their use (MFU), memory; with a peer, its figures and the ratio.

    Raises:
        UserError: the configuration or the peer cannot be measured here. RunError: memory ran out, or the loss is not
            finite.
    """
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device, seq_len, batch_tokens, recompute)
    if peer is not None:
        check_peer(peer, device)
    if profile is not None and not profile.absolute().parent.is_dir():
        raise UserError(f"--profile {profile}: there is no folder {profile.parent}; make it first")
    world = collectives.start()
    if world.size > 1:
        raise UserError(f"bench train measures one device, but WORLD_SIZE is {world.size}; start it without a launcher")
    figures = _measure_own(config, workload, world, profile)
    if peer is not None:
        # the peer takes minutes more, and a limit of time may cut it
        console.print(f"{config.name}: {figures['tokens_per_s']:,.0f} tokens/s; now {peer}", markup=False)
        figures["peer"] = _measure_peer(peer, config, workload, world.device, peer_recompute)
        if "tokens_per_s" in figures["peer"]:
            figures["ratio"] = figures["tokens_per_s"] / figures["peer"]["tokens_per_s"]
    collectives.leave()
    return figures


def bench_config(
    preset: str,
    overrides: list[str],
    device: torch.device,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    recompute: str = "none",
) -> RunConfig:
    """The preset as it is measured: ZeRO-1, one row per update, bf16 on a GPU; `overrides` win.

    Raises:
        UserError: see `load_config`.
    """
    tokens = load_config(preset).data.seq_len if seq_len is None else seq_len
    settings = [
        f"data.seq_len={tokens}",
        f"batch.tokens={tokens if batch_tokens is None else batch_tokens}",
        f"activation_checkpointing={recompute}",
        "deepspeed=zero1",
        *(["precision=bf16"] if device.type == "cuda" else []),
    ]
    return load_config(preset, [*settings, *overrides])


def _measure_own(config: RunConfig, workload: Workload, world: World, profile: Path | None) -> dict[str, Any]:
    device, tried = world.device, f"{config.name}, {config.batch.micro_rows} x {config.data.seq_len} tokens"
    with oom_context(f"{tried}, activation_checkpointing {config.activation_checkpointing.policy}"):
        reset_memory(device)
        training = TrainingStep(config, world)
        losses: list[float] = []

        def update(batches: list[Batch], step: int) -> None:
            losses.append(training.update(batches, step).loss)

        seconds, flops = _timed_updates(config.name, config, workload, device, update)
        memory = memory_figures(device)
        loss = losses[-1]
        if not math.isfinite(loss):
            raise RunError(f"the loss of {config.name} became {loss} after {len(losses)} updates: nothing was measured")
        figures = {
            **_describe(config, workload),
            **describe_machine(device),
            "kernels": dict(training.engine.module.kernels.names),
            **_throughput(config.batch.tokens, seconds),
            **_utilization(config, flops, statistics.median(seconds), device),
            **memory,
            "loss": loss,
        }
        if profile is not None:
            last = workload.warmup + workload.steps
            batches = _batches(config, workload, last)
            usual = statistics.median(seconds)
            figures["profile"] = profile_step(device, partial(update, batches, last), profile, usual)
    training.engine.destroy()
    return figures


def _describe(config: RunConfig, workload: Workload) -> dict[str, Any]:
    return {
        "preset": config.name,
        "parameters": config.model.parameter_count(),
        "seq_len": config.data.seq_len,
        "batch_tokens": config.batch.tokens,
        "documents": workload.documents,
        "recompute": config.activation_checkpointing.policy,
        "precision": config.precision,
        "deepspeed": config.deepspeed,
        "steps": workload.steps,
        "warmup": workload.warmup,
    }


def _throughput(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens/s of the median step, and the spread of all."""
    return {"tokens_per_s": tokens / statistics.median(seconds), "step": timing_summary(seconds)}


def _utilization(
    config: RunConfig, flops: list[dict[str, int]], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Model FLOPs of the mean step, by part, and the share of the device's peak that they make of the median step."""
    by_part = {part: sum(step[part] for step in flops) / len(flops) for part in flops[0]}
    total, six_n = sum(by_part.values()), six_n_flops(config.model, config.batch.tokens)
    peak = peak_flops(device_name(device))
    return {
        "model_tflop_per_step": total / 1e12,
        "model_tflop_share": {part: count / total for part, count in by_part.items() if count},
        "tflop_per_s": total / seconds / 1e12,
        "peak_tflop_per_s": None if peak is None else peak / 1e12,
        "mfu": None if peak is None else total / seconds / peak,
        "mfu_6n": None if peak is None else six_n / seconds / peak,
    }


def _batches(config: RunConfig, workload: Workload, step: int) -> list[Batch]:
    """The batches of one update, a fresh one for each pass."""
    micro_rows, seq_len = config.batch.micro_rows, config.data.seq_len
    return [
        rows.synthetic_batch(workload.documents, micro_rows, seq_len, config.model.vocab_size, (config.seed, step, i))
        for i in range(config.accumulation_steps(1))
    ]


def _timed_updates(
    title: str,
    config: RunConfig,
    workload: Workload,
    device: torch.device,
    update: Callable[[list[Batch], int], None],
) -> tuple[list[float], list[dict[str, int]]]:
    """Run the updates; seconds of each timed one, and its model FLOPs by part. Making the rows is not timed."""
    seconds, flops = [], []
    with progress_bar() as bar:
        task = bar.add_task(title, total=workload.warmup + workload.steps, note="warming up")
        for step in range(workload.warmup + workload.steps):
            batches = _batches(config, workload, step)
            taken = elapsed(device, partial(update, batches, step))
            bar.update(task, advance=1, note=f"{config.batch.tokens / taken:,.0f} tokens/s")
            if step >= workload.warmup:
                seconds.append(taken)
                documents = [length for batch in batches for length in batch.lengths]
                flops.append(update_flops(config.model, documents))
    return seconds, flops


def _measure_peer(
    name: str, config: RunConfig, workload: Workload, device: torch.device, recompute: bool
) -> dict[str, Any]:
    """The peer's figures on the same rows; if it does not fit the device, the line that says so (`problem`)."""
    gc.collect()
    reset_memory(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    tried = f"{name}, {config.batch.micro_rows} x {config.data.seq_len} tokens"
    figures = {"peer": name, "recompute": "full" if recompute else "none", "held_before_bytes": held}
    try:
        with oom_context(f"{tried}, recompute {figures['recompute']}"):
            peer = Peer(name, config, device, recompute)
            seconds, _ = _timed_updates(name, config, workload, device, peer.update)
    except RunError as error:
        return {**figures, "problem": str(error)}  # what was measured of the other is worth keeping
    return {
        **figures,
        **peer.describe(),
        **_throughput(config.batch.tokens, seconds),
        **memory_figures(device),
    }
