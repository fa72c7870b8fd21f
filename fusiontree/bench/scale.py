"""Benchmark of scaling: updates on several numbers of ranks, at several ZeRO stages, next to torch's FSDP2.

Each case has processes of its own, so no case sees the memory of another. All cases run one after the other on the same
machine, on the same synthetic rows per rank.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusiontree.bench.profiling import exposed_communication
from fusiontree.bench.train import Workload, bench_config, synthetic_batches
from fusiontree.config import RunConfig
from fusiontree.console import console, progress_bar
from fusiontree.data.batch import Batch
from fusiontree.device import accelerator, describe_machine, elapsed, memory_figures, oom_context, reset_memory
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.distributed.ports import free_port
from fusiontree.errors import RunError, UserError

PEERS = ("fsdp2",)


class Case(NamedTuple):
    """One measurement."""

    engine: str  # zero1, zero2, ..., or a peer
    ranks: int
    accumulate: int  # backward passes per update


@dataclass(frozen=True)
class ScaleOptions:
    """The cases of a scaling benchmark.

    Raises:
        UserError: a number or a name is invalid.
    """

    ranks: tuple[int, ...] = (1, 2)
    stages: tuple[int, ...] = (1, 3)
    accumulate: tuple[int, ...] = (1,)
    peer: str | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "accumulate"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"--{name} has {min(getattr(self, name))}; it must be at least 1")
        for stage in self.stages:
            if stage not in range(4):
                raise UserError(f"--zero has {stage}; choose from 0, 1, 2 and 3")
        if self.peer not in (None, *PEERS):
            raise UserError(f"--peer {self.peer} is unknown; choose {' or '.join(PEERS)}")

    def cases(self) -> list[Case]:
        """Return all cases; fewer ranks first."""
        engines = [f"zero{stage}" for stage in self.stages] + ([self.peer] if self.peer else [])
        return [Case(engine, n, passes) for n in self.ranks for passes in self.accumulate for engine in engines]


def bench_scale(preset: str, overrides: list[str], workload: Workload, options: ScaleOptions) -> dict[str, Any]:
    """Measure all cases of `options`; this process starts their ranks.

    Args:
        preset: its name or a YAML file.
        overrides: ``key=value``, as for a run.
        workload: rows and number of updates; its `batch_tokens` is ignored.
        options: the cases.

    Returns:
        The machine and for each case tokens/s per GPU, its ratio to one rank's (`efficiency`), time, memory and loss.

    Raises:
        UserError: the configuration is invalid, or the machine has too few GPUs.
        RunError: a rank failed.
    """
    gpus = torch.cuda.device_count() if accelerator() == "cuda" else None
    if gpus is not None and max(options.ranks) > gpus:
        raise UserError(f"--ranks has {max(options.ranks)}, but this machine has {gpus} GPU(s); use fewer ranks")
    config = bench_config(preset, overrides, torch.device(accelerator()), workload)
    if config.optimizer.kind != "adamw" and options.peer:
        raise UserError(f"--peer {options.peer} has no optimizer {config.optimizer.kind}; remove the peer")
    cases = []
    with progress_bar() as bar, tempfile.TemporaryDirectory() as folder:
        task = bar.add_task(config.name, total=len(options.cases()), note="starting ranks")
        for case in options.cases():
            figures = _measure(case, preset, overrides, workload, Path(folder))
            cases.append({**case._asdict(), **figures})
            console.print(_line(cases[-1]), markup=False)  # now: a time limit may end the process before the others
            bar.update(task, advance=1, note="")
    for figures in cases:
        single = _single(cases, figures["accumulate"])
        figures["efficiency"] = figures["tokens_per_s_per_rank"] / single if single else None
    shared = {"preset": config.name, "seq_len": config.data.seq_len, "micro_rows": config.batch.micro_rows}
    described = {"recompute": workload.recompute, "precision": config.precision, "documents": workload.documents}
    return {**shared, **described, **describe_machine(torch.device(accelerator())), "cases": cases}


def _line(figures: dict[str, Any]) -> str:
    memory = figures["peak_memory_bytes"]
    peak = "" if memory is None else f", {memory / 2**30:.1f} GiB"
    place = f"{figures['engine']}, {figures['ranks']} rank(s), {figures['accumulate']} pass(es)"
    return f"{place}: {figures['tokens_per_s_per_rank']:,.0f} tokens/s per rank{peak}"


def _single(cases: list[dict[str, Any]], accumulate: int) -> float | None:
    """Return the throughput of the fastest ZeRO stage on one rank."""
    ours = [case for case in cases if case["ranks"] == 1 and case["engine"].startswith("zero")]
    return max((case["tokens_per_s_per_rank"] for case in ours if case["accumulate"] == accumulate), default=None)


def _measure(case: Case, preset: str, overrides: list[str], workload: Workload, folder: Path) -> dict[str, Any]:
    """Start the ranks of a case and return their figures."""
    result = folder / "figures.json"
    result.unlink(missing_ok=True)
    request = json.dumps([case, preset, overrides, asdict(workload), str(result)])
    program = [sys.executable, "-c", "import sys; from fusiontree.bench.scale import main; main(sys.argv[1])", request]
    shared = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["TRITON_CACHE_AUTOTUNING"] = "1"  # tune a kernel once, not in each case
    logs = [folder / f"rank-{rank}.log" for rank in range(case.ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        with open(log, "w") as stream:
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(program, env=environment, stdout=stream, stderr=stream))
    try:
        _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if not result.exists():
        failed = next((rank for rank, process in enumerate(ranks) if process.returncode > 0), 0)
        (*_, last) = ["no output", *filter(None, logs[failed].read_text(errors="replace").splitlines())]
        raise RunError(f"rank {failed} of {case.ranks} ({case.engine}, {case.accumulate} pass(es)) failed: {last}")
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all ranks have ended, or one has failed."""
    while any(process.returncode is None for process in ranks):
        for process in ranks:
            try:
                if process.wait(timeout=0.1):
                    return
            except subprocess.TimeoutExpired:
                continue


# --- a rank ----------------------------------------------------------------------------------------------------------


def main(request: str) -> None:
    """Measure the case in `request` as one of its ranks; rank 0 writes the figures."""
    fields, preset, overrides, workload_fields, result = json.loads(request)
    case, workload = Case(*fields), Workload(**workload_fields)
    world = collectives.start()
    try:
        figures = _rank_figures(case, preset, overrides, workload, world)
    except (RunError, UserError) as error:
        raise SystemExit(str(error)) from None
    if world.is_main:
        Path(result).write_text(json.dumps(figures))
    collectives.leave()


def _rank_figures(case: Case, preset: str, overrides: list[str], workload: Workload, world: World) -> dict[str, Any]:
    config = bench_config(preset, overrides, world.device, workload)
    tokens = config.data.seq_len * config.batch.micro_rows * case.ranks * case.accumulate
    stage = [] if case.engine in PEERS else [f"deepspeed={case.engine}"]
    config = bench_config(preset, [*overrides, f"batch.tokens={tokens}", *stage], world.device, workload)
    with oom_context(f"{config.name}, {case.engine}, {config.batch.micro_rows} x {config.data.seq_len} tokens"):
        reset_memory(world.device)
        update = _update_of(case.engine, config, world)
        seconds: list[float] = []
        losses: list[float] = []
        for step in range(workload.warmup + workload.steps):
            batches = synthetic_batches(config, workload, step, (world.rank,), world.size)
            collectives.barrier()
            seconds.append(elapsed(world.device, lambda: losses.append(update(batches, step))))  # noqa: B023
        memory = memory_figures(world.device)
        exposed = exposed_communication(world.device, partial(update, batches, step))
    timed = torch.tensor(seconds[workload.warmup :], dtype=torch.float64, device=world.device)
    slowest = statistics.median(collectives.max_over_ranks(timed).tolist())
    gathered = collectives.gather(memory["peak_memory_bytes"])
    return {
        "step_seconds": slowest,
        "tokens_per_s_per_rank": tokens / slowest / case.ranks,
        "peak_memory_bytes": None if None in gathered else max(gathered),
        "exposed_communication_seconds": exposed,
        "loss": losses[-1],
    }


def _update_of(engine: str, config: RunConfig, world: World) -> Callable[[list[Batch], int], float]:
    """Build the model under `engine` and return the function that runs an update and returns its loss."""
    if engine in PEERS:
        from fusiontree.bench.fsdp import FsdpStep

        return FsdpStep(config, world).update
    from fusiontree.training.step import TrainingStep

    training = TrainingStep(config, world)
    return lambda batches, step: training.update(batches, step).loss
