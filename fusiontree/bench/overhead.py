"""Benchmark of the engine's overhead: a real run against a bare DeepSpeed loop over the same model and rows.

Both run in one process and alternate block by block, so that other load on the machine affects both.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusiontree.bench import rows
from fusiontree.config import RunConfig, load_config
from fusiontree.data.batch import Batch
from fusiontree.data.format import Manifest, TokenizerInfo
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.stream import TrainStream
from fusiontree.data.writer import ShardWriter
from fusiontree.device import describe_machine, oom_context, timing_summary
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import UserError
from fusiontree.model.documents import to_device
from fusiontree.run.datasets import make_recipe, open_data
from fusiontree.training.engine_setup import build_model, engine_settings
from fusiontree.training.optimizer import build_optimizer
from fusiontree.training.trainer import Trainer
from fusiontree.zero.setup import initialize

BLOCK = 5  # consecutive updates of the run, and of the bare loop
SYNTHETIC_ROWS = 256


def bench_overhead(source: str, overrides: list[str], rounds: int = 12, warmup: int = 2) -> dict[str, Any]:
    """Measure a run of configuration `source` on one device against a bare loop.

    The run uses `Trainer`: it reads shards, counts damaged rows, keeps gate statistics, records metrics at least once
    per block and layer figures when due; it does not validate or save. The bare loop has the rows of each block in
    memory and runs forward, backward and step.

    Args:
        source: a preset's name or a YAML file.
        overrides: ``key=value``; without data.path, rows are synthetic.
        rounds: timed pairs of blocks.
        warmup: untimed pairs before them.

    Returns:
        Seconds per update of both, and the overhead: the median over the rounds of their ratio minus one.

    Raises:
        UserError: the configuration cannot be measured here.
    """
    for name, value, least in (("--rounds", rounds, 1), ("--warmup", warmup, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    with tempfile.TemporaryDirectory(prefix="fusiontree-overhead-") as folder:
        config = overhead_config(source, overrides, Path(folder), (rounds + warmup) * BLOCK + 1)
        world = collectives.start()
        if world.size > 1:
            raise UserError(
                f"bench overhead measures one device, but WORLD_SIZE is {world.size}; start it without a launcher"
            )
        pairs = _measure(config, world, rounds + warmup)[warmup:]
        figures = _describe(config, rounds) | describe_machine(world.device) | _figures(pairs)
        collectives.leave()
    return figures


def overhead_config(source: str, overrides: list[str], folder: Path, steps: int) -> RunConfig:
    """Return the measured configuration, over synthetic rows under `folder` unless it names a dataset.

    Raises:
        UserError: see `load_config`.
    """
    every = min(load_config(source, overrides).logging.every, BLOCK)
    settings = [
        *(f"output={folder}", "name=overhead", "validation.every=0", f"checkpoint.every={10 * steps}"),
        *(f"schedule.steps={steps}", "schedule.warmup_steps=0", f"logging.every={every}"),
    ]
    config = load_config(source, [*overrides, *settings])
    if config.data.locations:
        return config
    _write_rows(folder / "data", config)
    return load_config(source, [*overrides, *settings, f"data.path={folder / 'data'}"])


def _write_rows(folder: Path, config: RunConfig) -> None:
    """Write a dataset of random tokens in documents of random lengths."""
    length, vocab, draw = config.data.seq_len, config.model.vocab_size, np.random.default_rng(config.seed)
    dtype = np.uint16 if vocab <= 2**16 else np.uint32
    folder.mkdir()
    writer = ShardWriter(folder, "train", "synthetic")
    for row in range(SYNTHETIC_ROWS):
        lengths = rows.document_lengths("packed", length, draw)
        ends = np.cumsum(lengths, dtype=np.int32)
        spans = [Span(f"{row}-{i}", int(end) - n, n, 0) for i, (end, n) in enumerate(zip(ends, lengths, strict=True))]
        writer.add([PackedRow(draw.integers(vocab, size=length).astype(dtype), ends, spans)])
    splits = {"train": writer.finish(), "validation": []}
    Manifest(length, np.dtype(dtype).name, "synthetic", TokenizerInfo("", vocab, 0, 1), splits).save(folder)


@dataclass(frozen=True)
class Seconds:
    """Wall-clock time and CPU time of a block."""

    wall: float
    cpu: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


class _RoundsDone(Exception):  # noqa: N818
    """Signal from the stream that all rounds are done; it ends the run."""


class _AlternatingStream(TrainStream):
    """The run's stream, which hands every block to the bare loop as well, before or after the run trains on it.

    The first to see a new shape of rows pays for its compilation, so the order alternates from block to block.
    """

    def __init__(self, config: RunConfig, world: World, bare: "BareLoop", rounds: int):
        super().__init__(
            open_data(config).train, make_recipe(config), config.batch.micro_rows, workers=config.data.workers
        )
        self.bare, self.device, self.rounds = bare, world.device, rounds
        self.block: list[list[Batch]] = []
        self.remaining: list[list[Batch]] = []  # batches of the block that the run has not trained on
        self.pairs: list[tuple[Seconds, Seconds]] = []  # of the run and of the bare loop

    def __next__(self) -> list[Batch]:
        if not self.remaining:
            if self.block:
                self._close_block()
            self._open_block()
        return self.remaining.pop(0)

    def _open_block(self) -> None:
        start = _clock(self.device)
        self.block = [TrainStream.__next__(self) for _ in range(BLOCK)]
        self.remaining = list(self.block)
        self.reading = _clock(self.device) - start
        self.bare_seconds = self._bare_block() if len(self.pairs) % 2 else None
        self.started = _clock(self.device)

    def _close_block(self) -> None:
        ours = _clock(self.device) - self.started + self.reading
        self.pairs.append((ours, self.bare_seconds or self._bare_block()))
        if len(self.pairs) == self.rounds:
            raise _RoundsDone

    def _bare_block(self) -> "Seconds":
        start = _clock(self.device)
        for batches in self.block:
            self.bare.update(batches)
        return _clock(self.device) - start


class BareLoop:
    """Minimal training loop: the same model and optimizer under DeepSpeed, with DeepSpeed's own clipping."""

    def __init__(self, config: RunConfig, world: World):
        settings = engine_settings(config, world) | {"gradient_clipping": config.optimizer.grad_clip}
        settings["zero_optimization"].pop(
            "compute_grad_norm", None
        )  # set for the run, whose clipping computes the norm
        model = build_model(config, world, settings)
        optimizer = build_optimizer(model, config.optimizer)
        self.engine = initialize(model, optimizer, settings)
        self.device = world.device

    def update(self, batches: list[Batch]) -> torch.Tensor:
        """Run one optimizer update and return the mean loss of the last batch in nats per token, ()."""
        self.engine.train()
        for batch in batches:
            input_ids, labels, documents = to_device(batch, self.device)
            loss = self.engine(input_ids, documents, labels=labels).loss_sum / max(1, batch.real_tokens)
            self.engine.backward(loss)
            self.engine.step()
        return loss.detach()


def _measure(config: RunConfig, world: World, rounds: int) -> list[tuple[Seconds, Seconds]]:
    config.run_dir.mkdir(parents=True)
    with oom_context(f"two models of {config.name} in memory"):
        stream = _AlternatingStream(config, world, BareLoop(config, world), rounds)
        trainer = Trainer(config, world, open_data(config), stream, None)
        with contextlib.closing(stream), contextlib.suppress(_RoundsDone):
            trainer.run()
    return stream.pairs


def _clock(device: torch.device) -> Seconds:
    """Return the clocks after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def _describe(config: RunConfig, rounds: int) -> dict[str, Any]:
    return {
        "parameters": config.model.parameter_count(),
        "seq_len": config.data.seq_len,
        "batch_tokens": config.batch.tokens,
        "micro_rows": config.batch.micro_rows,
        "precision": config.precision,
        "deepspeed": config.deepspeed,
        "logging_every": config.logging.every,
        "layers_every": config.logging.layers_every,
        "rounds": rounds,
        "updates_per_block": BLOCK,
    }


def _figures(pairs: list[tuple[Seconds, Seconds]]) -> dict[str, Any]:
    """Return the overhead by wall-clock time and by CPU time, which other load on the machine disturbs less."""
    return {
        "run_update": timing_summary([ours.wall / BLOCK for ours, _ in pairs]),
        "bare_update": timing_summary([bare.wall / BLOCK for _, bare in pairs]),
        "overhead": _overhead([ours.wall / bare.wall for ours, bare in pairs]),
        "overhead_of_cpu_time": _overhead([ours.cpu / bare.cpu for ours, bare in pairs]),
    }


def _overhead(ratios: list[float]) -> dict[str, Any]:
    """Return the median ratio minus one, with the quartiles and every round."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "median": statistics.median(ratios) - 1,
        "lower_quartile": low - 1,
        "upper_quartile": high - 1,
        "rounds": [ratio - 1 for ratio in ratios],
    }
