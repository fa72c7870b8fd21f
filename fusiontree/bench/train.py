"""Benchmark of training: the engine of a real run on synthetic rows, next to peer models."""

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
    """The rows and updates of a training benchmark.

    Raises:
        UserError: a number is out of range.
    """

    documents: rows.Documents = "packed"
    steps: int = 10  # timed updates
    warmup: int = 3  # untimed updates before them: compilation, autotuning, the allocator
    seq_len: int | None = None  # tokens per row; None: the preset's
    batch_tokens: int | None = None  # tokens per update; None: one row
    recompute: str = "none"  # value of `activation_checkpointing`

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class PeerRun:
    """The peer of a training benchmark."""

    name: str  # one of `peers.PEERS`
    recompute: bool = True  # full recomputation in its backward pass


def bench_train(
    preset: str, overrides: list[str], workload: Workload, peer: PeerRun | None = None, profile: Path | None = None
) -> dict[str, Any]:
    """Measure optimizer updates of `preset` on one device and, in the same process, those of a `peer`.

    Args:
        preset: its name or a YAML file.
        overrides: ``key=value``, as for a run.
        workload: rows and number of updates.
        peer: another model that trains on the same rows.
        profile: file for a report of the GPU time of one update.

    Returns:
        Throughput, step time, model FLOPs, MFU and memory; with a peer, the same of the peer and the ratio.

    Raises:
        UserError: the configuration or the peer cannot be measured here.
        RunError: out of memory, or the loss is not finite.
    """
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device, workload)
    if peer is not None:
        check_peer(peer.name, device)
    if profile is not None and not profile.absolute().parent.is_dir():
        raise UserError(f"--profile {profile}: the folder {profile.parent} does not exist; create it first")
    world = collectives.start()
    if world.size > 1:
        raise UserError(f"bench train measures one device, but WORLD_SIZE is {world.size}; start it without a launcher")
    figures = _measure_own(config, workload, world, profile)
    if peer is not None:
        # print our figure now: the peer takes minutes more, and a time limit may end the process
        console.print(f"{config.name}: {figures['tokens_per_s']:,.0f} tokens/s; next: {peer.name}")
        figures["peer"] = _measure_peer(peer, config, workload, world.device)
        if "tokens_per_s" in figures["peer"]:
            figures["ratio"] = figures["tokens_per_s"] / figures["peer"]["tokens_per_s"]
    collectives.leave()
    return figures


def bench_config(preset: str, overrides: list[str], device: torch.device, workload: Workload = Workload()) -> RunConfig:
    """Return the preset as it is measured: ZeRO-1, one row per update, bf16 on a GPU; `overrides` take precedence.

    Raises:
        UserError: see `load_config`.
    """
    tokens = load_config(preset).data.seq_len if workload.seq_len is None else workload.seq_len
    settings = [
        f"data.seq_len={tokens}",
        f"batch.tokens={tokens if workload.batch_tokens is None else workload.batch_tokens}",
        f"activation_checkpointing={workload.recompute}",
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
            raise RunError(f"the loss of {config.name} is {loss} after {len(losses)} updates, so nothing was measured")
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
            batches = synthetic_batches(config, workload, last)
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
    """Return the tokens/s of the median step and the spread of all steps."""
    return {"tokens_per_s": tokens / statistics.median(seconds), "step": timing_summary(seconds)}


def _utilization(
    config: RunConfig, flops: list[dict[str, int]], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Return the model FLOPs of the mean step by part, and the MFU of the median step."""
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


def synthetic_batches(
    config: RunConfig, workload: Workload, step: int, rank: tuple[int, ...] = (), ranks: int = 1
) -> list[Batch]:
    """Return one rank's batches of an update, one per accumulation step; `rank` is a part of their seed."""
    shape = config.batch.micro_rows, config.data.seq_len, config.model.vocab_size
    return [
        rows.synthetic_batch(workload.documents, *shape, (config.seed, step, part, *rank))
        for part in range(config.accumulation_steps(ranks))
    ]


def _timed_updates(
    title: str,
    config: RunConfig,
    workload: Workload,
    device: torch.device,
    update: Callable[[list[Batch], int], None],
) -> tuple[list[float], list[dict[str, int]]]:
    """Run the updates and return the seconds and the model FLOPs by part of each timed one.

    The rows are generated outside the timed region.
    """
    seconds, flops = [], []
    with progress_bar() as bar:
        task = bar.add_task(title, total=workload.warmup + workload.steps, note="warming up")
        for step in range(workload.warmup + workload.steps):
            batches = synthetic_batches(config, workload, step)
            taken = elapsed(device, partial(update, batches, step))
            bar.update(task, advance=1, note=f"{config.batch.tokens / taken:,.0f} tokens/s")
            if step >= workload.warmup:
                seconds.append(taken)
                documents = [length for batch in batches for length in batch.lengths]
                flops.append(update_flops(config.model, documents))
    return seconds, flops


def _measure_peer(run: PeerRun, config: RunConfig, workload: Workload, device: torch.device) -> dict[str, Any]:
    """Return the peer's figures on the same rows, or the reason (`problem`) if it does not fit the device."""
    gc.collect()
    reset_memory(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    tried = f"{run.name}, {config.batch.micro_rows} x {config.data.seq_len} tokens"
    figures = {"peer": run.name, "recompute": "full" if run.recompute else "none", "held_before_bytes": held}
    try:
        with oom_context(f"{tried}, recompute {figures['recompute']}"):
            peer = Peer(run.name, config, device, run.recompute)
            seconds, _ = _timed_updates(run.name, config, workload, device, peer.update)
    except RunError as error:
        return {**figures, "problem": str(error)}  # keep the figures of our own model
    return {
        **figures,
        **peer.describe(),
        **_throughput(config.batch.tokens, seconds),
        **memory_figures(device),
    }
