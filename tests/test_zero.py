"""Every ZeRO stage, number of ranks and accumulation has the loss curve of a plain training loop, with all losses.

One process imports everything and forks worlds of 4 and of 2 ranks; each builds one engine after another.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NO_ASYNC_IO, SMALL, has_async_io
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree.config import RunConfig, load_config
from fusiontree.data.batch import Batch, collate
from fusiontree.distributed.collectives import World
from fusiontree.model.documents import to_device
from fusiontree.model.lm import HybridLM, branch_drops, materialize, seeded_init
from fusiontree.training.gates import DECAY
from fusiontree.training.optimizer import build_optimizer
from fusiontree.training.schedule import learning_rate, value_at

STEPS, ROWS, LENGTH, VOCAB = 20, 8, 48, 96
SHAPE = {
    **{name: value for name, value in vars(SMALL).items() if name not in ("num_layers", "branch_drop")},
    "num_layers": 2,
    "branch_drop": 0.2,
}
LOSSES = [
    *("losses.z_loss=0.01", "losses.gate_balance={0: 0.5, 10: 2}", "losses.gate_target=0.7", "losses.gate_band=0.1"),
    *("losses.gate_entropy=0.3", "distill.weight={0: 1, 20: 0.5}", "distill.temperature=2.0", "distill.top_k=9"),
]
MUON = ["optimizer.kind=muon", "optimizer.grad_clip=0", "schedule.steps=6"]
ALL_GATHERED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
# more than 1 MiB of states per rank: DeepSpeed keeps fewer in memory
WIDE = ["model.mlp_size=4096", "schedule.steps=6"]
RECOMPUTED = "activation_checkpointing={policy: full, offload: true}"
JOBS = {  # by name: ranks and overrides
    "zero2 x4": (4, ["deepspeed=zero2", "activation_checkpointing=branch"]),
    "zero3_offload x4": (4, ["deepspeed=zero3_offload", "activation_checkpointing=every_n"]),
    "zero0 x2": (2, ["batch.micro_rows=2", "deepspeed=zero0"]),
    "zero1 x2": (2, ["batch.micro_rows=2", "deepspeed=zero1", RECOMPUTED]),
    "zero3 x2": (2, ["batch.micro_rows=2", "deepspeed=zero3", "activation_checkpointing=branch"]),
    # no parameter stays gathered; four ranks pad most of them, and some ranks have no part of the smallest
    "zero3 all gathered x4": (4, ["deepspeed={folder}/all_gathered.json"]),
    "zero3 all gathered x2": (2, ["batch.micro_rows=2", "deepspeed={folder}/all_gathered.json", RECOMPUTED]),
    "muon zero3 x2": (2, ["batch.micro_rows=2", "deepspeed=zero3", *MUON]),
    "zero3_nvme x2": (2, ["batch.micro_rows=2", "deepspeed=zero3_nvme", *WIDE]),
}
KINDS = {"adamw": [], "muon": MUON, "wide": WIDE}  # overrides that the plain loop must share


def skipped(name: str) -> bool:
    """Return whether a job needs DeepSpeed's asynchronous I/O, and it is not built here."""
    return "nvme" in name and not has_async_io()


def config_of(folder: Path, overrides: list[str], shape: dict[str, Any] = SHAPE) -> RunConfig:
    words = [f"model.{name}={json.dumps(value)}" for name, value in shape.items()]
    batch = [f"data.seq_len={LENGTH}", f"batch.tokens={ROWS * LENGTH}", "batch.micro_rows=1", "optimizer.lr=3e-3"]
    lengths = [f"schedule.steps={STEPS}", "schedule.warmup_steps=3", f"distill.teacher={folder / 'teacher'}"]
    lengths.append(f"nvme_path={folder / 'nvme'}")
    chosen = [override.replace("{folder}", str(folder)) for override in overrides]
    return load_config("tiny", [*words, *batch, *lengths, *LOSSES, "activation_checkpointing=none", *chosen])


def rows_of(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return tokens and document ends of each row of an update; rows differ in their number of labels."""
    draw = np.random.default_rng(step)
    ends = [np.sort(draw.choice(np.arange(1, LENGTH), size=row % 4 * 5, replace=False)) for row in range(ROWS)]
    return [(draw.integers(VOCAB, size=LENGTH), np.append(cut, LENGTH).astype(np.int32)) for cut in ends]


def batch_of(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    return collate(np.stack([tokens for tokens, _ in rows]), [ends for _, ends in rows])


def start(config: RunConfig) -> HybridLM:
    with torch.device("meta"):
        model = HybridLM(config.model)
    list(materialize(model, seeded_init(config.seed), torch.device("cpu")))
    return model


def write_teacher(folder: Path) -> None:
    """Write the files of an export that a teacher is read from, for a model of another shape."""
    folder.mkdir()
    shape = SHAPE | {"hidden_size": 16, "num_layers": 1, "branch_drop": 0.0}
    torch.manual_seed(1)
    model = HybridLM(type(SMALL)(**shape))
    with torch.no_grad():
        model.embedding.weight.mul_(8)  # else its distributions are nearly uniform
    save_file({f"model.{name}": weight for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "fusiontree.json").write_text(json.dumps({"tokenizer_fingerprint": "f", "eos_id": 0, "seq_len": 48}))
    (folder / "tokenizer.json").write_text(Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


# --- the reference ---------------------------------------------------------------------------------------------------


def penalty_of(mean: torch.Tensor, config: RunConfig, step: int) -> torch.Tensor:
    """Return the penalty on the gates, by its definition."""
    losses, penalty = config.losses, torch.zeros(())
    for layer in mean:
        outside = abs(layer.mean() - losses.gate_target) - losses.gate_band
        penalty = penalty + value_at(losses.gate_balance, step) * torch.relu(outside) / len(mean)
        entropy = torch.distributions.Bernoulli(layer).entropy().mean()
        penalty = penalty + value_at(losses.gate_entropy, step) * entropy / len(mean)
    return penalty


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Return the divergence from the teacher by token, from full distributions."""
    temperature, top = config.distill.temperature, teacher_logits.topk(config.distill.top_k).indices
    p, q = ((x / temperature).softmax(-1).gather(-1, top) for x in (teacher_logits, logits))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return temperature**2 * (p * (p / q).log()).sum(-1)


def plain_curve(config: RunConfig, teacher: HybridLM) -> dict[str, list[float]]:
    """Return losses and gradient norms without DeepSpeed, ranks, accumulation, recomputation or chunks."""
    model = start(config)
    optimizer = build_optimizer(model, config.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    mean = torch.full((2, config.model.hidden_size), 0.5)
    curve: dict[str, list[float]] = {"loss": [], "norm": [], "z_loss": [], "distill_loss": [], "gate_penalty": []}
    for step in range(config.schedule.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(config.schedule, peak, step)
        ids, labels, documents = to_device(batch_of(rows_of(step)), "cpu")
        drops = branch_drops(config.model, config.seed, step)
        real = labels != -100
        logits = model(ids, documents, branch_drops=drops).logits
        gates = model(ids, documents, labels=labels, branch_drops=drops).gates
        entropy = torch.nn.functional.cross_entropy(logits[real], labels[real])
        z_loss = config.losses.z_loss * logits.logsumexp(-1)[real].square().mean()
        with torch.no_grad():
            teacher_logits = teacher(ids, documents).logits
        distill_loss = divergence(logits, teacher_logits, config)[real].mean()
        known = mean.clone().requires_grad_()
        penalty = penalty_of(known, config, step)
        (slope,) = torch.autograd.grad(penalty, known)
        objective = entropy + z_loss + value_at(config.distill.weight, step) * distill_loss + (slope * gates).sum()
        optimizer.zero_grad()
        objective.backward()
        clip = config.optimizer.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        mean = mean.lerp(gates.detach(), 1 - DECAY)
        for name, value in zip(curve, (entropy, norm, z_loss, distill_loss, penalty), strict=True):
            curve[name].append(value.item())
    return curve


# --- the ranks -------------------------------------------------------------------------------------------------------


class LiveElements(TorchDispatchMode):
    """Counts the elements of all live storages that operations have created, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value) and value.device.type != "meta":
                self._count(value.untyped_storage(), value.element_size())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key, elements = storage._cdata, storage.nbytes() // size
        if key not in self.known:
            self.known.add(key)
            self.live += elements
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, elements)

    def _forget(self, key: int, elements: int) -> None:
        self.known.discard(key)
        self.live -= elements


def curve_of(config: RunConfig, world: World) -> dict[str, list[float]]:
    """Return the same figures as `plain_curve`, from this rank's share of the rows."""
    from fusiontree.distributed import collectives
    from fusiontree.training.step import TrainingStep

    training = TrainingStep(config, world)
    curve: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(config.schedule.steps):
        mine = rows_of(step)[world.rank :: world.size]
        micro_rows = config.batch.micro_rows
        batches = [batch_of(mine[first : first + micro_rows]) for first in range(0, len(mine), micro_rows)]
        update = training.update(batches, step)
        figures = {"loss": update.loss_share, **update.parts}
        sums = collectives.sum_over_ranks(torch.stack(list(figures.values()))).tolist()
        for name, value in zip(figures, sums, strict=True):
            curve.setdefault(name, []).append(value)
        curve["norm"].append(float(update.grad_norm))
    training.engine.destroy()
    return curve


def initial_at_zero3(folder: Path, world: World) -> dict[str, Any]:
    """Compare the initial weights of a ZeRO-3 model with a plain one's, and measure the peak of live elements."""
    import deepspeed

    from fusiontree.training.engine_setup import build_model, engine_settings

    config = config_of(folder, ["deepspeed=zero3", "model.num_layers=8"])
    with LiveElements() as elements:
        model = build_model(config, world, engine_settings(config, world))
    plain, equal = start(config), []
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            equal.append(torch.equal(parameter.data, expected.data))
    largest = max(parameter.numel() for parameter in plain.parameters())
    return {"equal": equal, "peak": elements.peak, "total": config.model.parameter_count(), "largest": largest}


def gathers_at_zero3(folder: Path, world: World, recompute: str) -> dict[str, Any]:
    """Return the dtypes of the tensors that an update and a validation batch gather, call by call, in bf16."""
    from fusiontree.training.step import TrainingStep
    from fusiontree.zero import block_gather

    overrides = ["deepspeed={folder}/all_gathered.json", "precision=bf16", f"activation_checkpointing={recompute}"]
    config = config_of(folder, [*overrides, "batch.micro_rows=4", "model.branch_drop=0"])
    training, calls, gather = TrainingStep(config, world), [], block_gather._coalesced

    def recorded(function: Any, outputs: Any, inputs: Any, group: Any) -> Any:
        calls.append((function is block_gather._all_gather, sorted({str(part.dtype) for part in inputs})))
        return gather(function, outputs, inputs, group)

    block_gather._coalesced = recorded
    batches = [batch_of(rows_of(0)[world.rank :: world.size])]
    training.update(batches, 0)
    update, calls[:] = calls[:], []
    training.eval()
    with torch.no_grad():
        training.token_losses(batches[0])
    block_gather._coalesced = gather
    model = training.engine.module
    left = sum(parameter.numel() for parameter in model.parameters())
    states = {str(parameter.ds_tensor.dtype) for parameter in model.parameters()}
    training.engine.destroy()
    return {"update": update, "validation": calls[:], "left": left, "partitions": sorted(states)}


def rank_main(rank: int, size: int, port: int, folder: Path) -> None:
    from fusiontree.distributed import collectives

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    world = collectives.start()
    results: dict[str, Any] = {}
    for name, (ranks, overrides) in JOBS.items():
        if ranks == size and not skipped(name):
            results[name] = curve_of(config_of(folder, overrides), world)
    results["start"] = initial_at_zero3(folder, world)
    if size == 2:
        results["gathers"] = {policy: gathers_at_zero3(folder, world, policy) for policy in ("none", "full")}
    (folder / f"ranks-{size}-{rank}.json").write_text(json.dumps(results))
    collectives.leave()


def main(folder: Path) -> None:
    """Fork the worlds and wait for their results."""
    import deepspeed  # noqa: F401 - imported once, before the fork

    import fusiontree.training.step  # noqa: F401 - also before the fork
    from fusiontree.distributed.ports import free_port

    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for size in (4, 2):
        port = free_port()
        ranks = [fork.Process(target=rank_main, args=(rank, size, port, folder)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0, process.exitcode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of all ranks."""
    folder = tmp_path_factory.mktemp("zero")
    write_teacher(folder / "teacher")
    (folder / "all_gathered.json").write_text(json.dumps(ALL_GATHERED))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "DS_ACCELERATOR": "cpu"}
    code = "import sys, pathlib, test_zero; test_zero.main(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the plain loop's curves, by kind."""
    from fusiontree.inference.loading import load_export

    teacher, _ = load_export(folder / "teacher", torch.device("cpu"))
    return {kind: plain_curve(config_of(folder, more), teacher) for kind, more in KINDS.items()}


@pytest.mark.parametrize("name", JOBS)
def test_the_curve_equals_the_plain_loop(name: str, folder: Path, references: dict) -> None:
    if skipped(name):
        pytest.skip(NO_ASYNC_IO)
    ranks, overrides = JOBS[name]
    (expected,) = [references[kind] for kind, more in KINDS.items() if {*more} == {*overrides} & {*MUON, *WIDE}]
    for rank in range(ranks):
        found = json.loads((folder / f"ranks-{ranks}-{rank}.json").read_text())[name]
        assert set(found) == set(expected)
        for figure in ("loss", "z_loss", "distill_loss", "gate_penalty"):
            assert found[figure] == pytest.approx(expected[figure], rel=1e-5), figure
        if "muon" not in name:  # its norm is that of the update, not of the gradient
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.mark.parametrize("ranks", [4, 2])
def test_zero3_has_the_plain_initial_weights_and_never_the_full_model(ranks: int, folder: Path) -> None:
    for rank in range(ranks):
        found = json.loads((folder / f"ranks-{ranks}-{rank}.json").read_text())["start"]
        assert all(found["equal"])
        assert found["peak"] < found["total"] / ranks + 2 * found["largest"]
        assert found["peak"] < found["total"]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_zero3_gathers_each_block_once_per_pass_in_bf16(policy: str, folder: Path) -> None:
    found = json.loads((folder / "ranks-2-0.json").read_text())["gathers"][policy]
    layers, mixed, full = SHAPE["num_layers"], ["torch.bfloat16", "torch.float32"], ["torch.float32"]
    gathers = [dtypes for is_gather, dtypes in found["update"] if is_gather]
    reductions = [dtypes for is_gather, dtypes in found["update"] if not is_gather]
    roots = len(gathers) - gathers.count(mixed)  # parameters outside the blocks, which are gathered in fp32
    # the last block keeps its weights for its backward pass, the others are gathered again
    assert gathers.count(mixed) == 2 * layers - 1
    assert gathers.count(full) == roots > 0
    assert reductions == [full] * (layers + roots)
    assert [dtypes for _, dtypes in found["validation"]].count(mixed) == layers
    assert found["left"] == 0
    assert found["partitions"] == full
