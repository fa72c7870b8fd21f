"""Shared shapes, models, datasets and runs."""

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import ranks
import torch
from cluster import Cluster
from safetensors.torch import save_file

from data_tools.build import build_shards
from data_tools.options import BuildOptions
from data_tools.tokenizers import train_tokenizer
from fusiontree.checkpoint import store
from fusiontree.cli import main
from fusiontree.config import load_config, to_yaml
from fusiontree.data.format import Dataset, Manifest, ShardInfo, TokenizerInfo, tokenizer_fingerprint
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.writer import SHARD_ROWS, ShardWriter
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.kernel_registry import Kernels
from fusiontree.model.lm import HybridLM
from fusiontree.run.folder import CONFIG_FILE, GATES_FILE, STATE_FILE

os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses, because the workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # runs our Triton kernels on the CPU

# small, but with every kind of head; the tests' rows cross its chunk and window
SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    global_heads=2,
    window=16,
    ssm_heads=4,
    ssm_head_dim=8,
    ssm_state_size=8,
    ssm_groups=2,
    chunk_size=16,
    gate_rank=8,
    max_positions=128,
)


# The longest files by CPU time. They start first, because one that starts last leaves the other worker idle.
LONGEST = [
    *("test_bad_input", "test_launcher", "test_training", "test_kill", "test_health", "test_zero", "test_backends"),
    *("test_export", "test_endings", "test_resize", "test_encoding", "test_patterns", "test_bench_scale"),
    *("test_bench_export", "test_init_from", "test_hf", "test_serve", "test_gpu"),
    *("test_triton_scan", "test_triton"),
]
SLOW_FILES = {
    *("test_backends", "test_triton", "test_triton_scan", "test_zero", "test_bench_export", "test_serve"),
    *("test_placement", "test_clipping", "test_precision", "test_data_continue", "test_overhead"),
}
SLOW_FIXTURES = {"shards", "job", "started", "measured"}  # data of real runs; launches; a run of bench train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests and order the longest files first."""
    for item in items:
        assert isinstance(item, pytest.Function)
        starts_ranks = hasattr(item.module, "ranks")
        fuzzes = item.path.stem.startswith("test_fuzz_")
        if item.path.stem in SLOW_FILES or starts_ranks or fuzzes or SLOW_FIXTURES & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let only slow tests fork."""
    ranks.slow = item.get_closest_marker("slow") is not None


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Limit torch to one thread: the workers share the cores, and results must not depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_patch_per_launch() -> Iterator[None]:
    """Let Triton's interpreter replace the functions of triton.language once per launch of a kernel.

    Triton 3.9 replaces them again in each call of a device function, which takes half of the time of a launch.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the globals that the current launch has patched

    def patch_once(function: FunctionType) -> object:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_unpatched(grid: object, *arguments: object, **options: object) -> None:
        patched.clear()
        launch(grid, *arguments, **options)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", launch_unpatched)
        yield


def build(
    seed: int = 0, kernels: Kernels | None = None, dtype: torch.dtype | None = None, **changes: object
) -> HybridLM:
    """Return a small model with gates away from their initial values and activations in `dtype`."""
    torch.manual_seed(seed)
    model = HybridLM(dataclasses.replace(SMALL, **changes), kernels, compute_dtype=dtype)
    for name, parameter in model.named_parameters():
        if "fusion.up" in name or name.endswith("fusion.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("srte.up"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def documents_of(rows: list[list[int]]) -> Documents:
    """Return documents of the given lengths, row by row."""
    numbers = [[i for i, length in enumerate(row) for _ in range(length)] for row in rows]
    return Documents.from_seq_idx(torch.tensor(numbers, dtype=torch.int32))


def write_split(
    folder: Path, split: str, rows: Iterable[PackedRow], source: str, shard_rows: int = SHARD_ROWS
) -> list[ShardInfo]:
    """Write the shards of one split and return their descriptions."""
    writer = ShardWriter(folder, split, source, shard_rows=shard_rows)
    writer.add(rows)
    return writer.finish()


def write_manifest(folder: Path, vocab_size: int, fingerprint: str = "f") -> None:
    """Write the manifest of a dataset without shards: all that a check before launch reads."""
    splits: dict[str, list[ShardInfo]] = {"train": [], "validation": []}
    Manifest(1024, "uint16", "s", TokenizerInfo(fingerprint, vocab_size, 0, 1), splits).save(folder)


def counting_dataset(folder: Path, rows: int, first: int, row_len: int = 32, tokenizer: str = "f") -> Dataset:
    """Write `rows` rows of two documents whose tokens encode their place: first + row_len * row + position."""
    folder.mkdir()
    packed = [
        PackedRow(
            tokens=np.arange(row_len * i, row_len * (i + 1), dtype=np.uint16) + first,
            ends=np.array([20, row_len], dtype=np.int32),
            spans=[Span(f"{i}a", 0, 20, 0), Span(f"{i}b", 20, row_len - 20, 0)],
        )
        for i in range(rows)
    ]
    splits = {"train": write_split(folder, "train", packed, "s", shard_rows=40), "validation": []}
    Manifest(row_len, "uint16", "s", TokenizerInfo(tokenizer, 60_000, 0, 1), splits).save(folder)
    return Dataset(folder)


# --- real runs -------------------------------------------------------------------------------------------------------

MICRO = {  # a model and a schedule that take two ranks seconds
    "model.vocab_size": 512,
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.mlp_size": 96,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.global_heads": 2,
    "model.window": 32,
    "model.ssm_heads": 4,
    "model.ssm_head_dim": 16,
    "model.ssm_state_size": 16,
    "model.chunk_size": 32,
    "model.gate_rank": 8,
    "data.seq_len": 128,
    "batch.tokens": 1024,
    "batch.micro_rows": 2,
    "schedule.steps": 8,
    "schedule.warmup_steps": 2,
    "checkpoint.every": 4,
    "validation.every": 4,
    "validation.rows": 6,
    "logging.every": 1,
    "logging.layers_every": 4,
}


def cli(
    *arguments: object, code: int = 0, timeout: float = 240, cwd: Path | None = None, fork: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; check its exit code and that it shows no traceback."""
    done = python("-m", "fusiontree", *arguments, code=code, timeout=timeout, cwd=cwd, fork=fork)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def python(
    *words: object, code: int = 0, timeout: float = 240, cwd: Path | None = None, fork: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS``, from -c or -m on, and check the exit code.

    With `fork` and without a GPU, the process is a fork of one that has torch and DeepSpeed imported.
    """
    command = [sys.executable, *map(str, words)]
    if fork and not torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            ended = ranks.python(command[1:], Path(folder), cwd or Path.cwd(), timeout)
        done = subprocess.CompletedProcess(command, *ended)
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def in_process(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which needs no imports; check its exit code and return as `cli` does.

    For commands that start no training: that would change this process.
    """
    words = [*map(str, arguments)]
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        returned = main(words)
    assert returned == code, f"{' '.join(words)}\n{output.getvalue()}\n{errors.getvalue()}"
    return subprocess.CompletedProcess(words, returned, output.getvalue(), errors.getvalue())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write fifty text files of few words, which a small model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["tree", "gate", "branch", "scan", "window", "state", "token", "shard", "row", "fuse"]
    draw = random.Random(0)
    for number in range(50):
        lines = [" ".join(draw.choices(words, k=6)) + "." for _ in range(draw.randint(5, 120))]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer of 512 tokens on `corpus`."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([corpus], 300, folder)
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build `corpus` into a dataset of 512-token rows with a tenth held out."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    build_shards([corpus], tokenizer_folder, folder, BuildOptions(row_len=512, holdout=0.1))
    return folder


def settings(shards: Path, output: Path, **changes: object) -> list[str]:
    """Return overrides that turn the tiny preset into a micro run under `output`; `changes` has __ for dots in keys."""
    values = {**MICRO, "output": output, "data.path": shards, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


NO_ASYNC_IO = (
    "DeepSpeed's async_io is not built: python -c 'import deepspeed.ops.op_builder as b; b.AsyncIOBuilder().load()' "
    "takes minutes, libaio-dev, g++ and ninja"
)


def has_async_io() -> bool:
    """Return whether DeepSpeed's NVMe extension was built for this environment.

    DeepSpeed would rebuild another environment's extension in every rank of a test.
    """
    package = find_spec("deepspeed")
    assert package is not None
    assert package.origin is not None
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    built = [path.with_name("build.ninja").read_text() for path in extensions.rglob("async_io.so")]
    return any(f"{Path(package.origin).parent}/" in rules for rules in built)


MEASURED = {"tokens_per_s", "tflop_per_s", "mfu", "memory_gib", "save_seconds"}  # differ between identical runs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a SLURM cluster of two nodes, which are also ssh hosts."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def calm(cluster: Cluster) -> Iterator[Cluster]:
    """Return the cluster with both nodes idle; cancel its jobs after the test."""
    cluster.settle()
    yield cluster
    cluster.run("scancel", "--user=root", code=None)
    cluster.settle()


LONG = {"schedule__steps": 60, "checkpoint__every": 5, "validation__every": 0}  # long enough to interrupt


@pytest.fixture(scope="session")
def truth(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `LONG` without interruption on two ranks of this machine."""
    output = tmp_path_factory.mktemp("truth")
    ranks.run(["train", "tiny", *settings(shards, output, name="truth", **LONG)], output, 2)
    return output / "truth"


def metrics(run: Path) -> list[dict]:
    """Return the lines of a run's metrics without the `MEASURED` keys."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


# --- checkpoints without a run ---------------------------------------------------------------------------------------


def write_layout(folder: Path, state: dict[str, torch.Tensor], stage: int, ranks: int, sub_group: int = 900) -> None:
    """Write `state` in DeepSpeed's layout; stage 3 splits flat groups into `sub_group` values."""
    folder.mkdir(parents=True)
    if stage < 3:
        torch.save({"module": state, "ds_version": "0"}, folder / "mp_rank_00_model_states.pt")
        return
    shapes = [{name: value.shape for name, value in state.items() if (value.ndim < 2) == few} for few in (False, True)]
    for rank in range(ranks):
        flat = []
        for group in shapes:
            for name in group:
                padded = torch.nn.functional.pad(state[name].flatten(), (0, -state[name].numel() % ranks))
                flat.append(padded.view(ranks, -1)[rank])
        parts = [part.clone() for part in torch.cat(flat).split(sub_group)]
        torch.save({"param_shapes": shapes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"partition_count": ranks, "fp32_flat_groups": parts, "optimizer_state_dict": {"state": {}}}
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)


def write_run(
    run: Path, config: ModelConfig, state: dict[str, torch.Tensor], tokenizer: Path, stage: int, ranks: int
) -> Path:
    """Write a run's folder with one checkpoint of `state`, and return the checkpoint."""
    folder = run / "checkpoints" / "step-1"
    write_layout(folder, state, stage, ranks, 2**20)
    values = load_config("tiny", ["data.seq_len=128"]).model_copy(update={"model": config})
    (folder / CONFIG_FILE).write_text(to_yaml(values))
    fingerprint = tokenizer_fingerprint(tokenizer)
    facts = {"step": 1, "tokens": 4096, "zero_stage": stage, "eos_id": 0, "pad_id": 1}
    facts |= {"tokenizer_fingerprint": fingerprint, "data_fingerprint": "", "world_size": ranks, "rows_consumed": 32}
    facts |= {"wandb_id": None, "left_out": [], "bad_rows": [], "health": {"skipped": 0, "bad": [], "losses": []}}
    (folder / STATE_FILE).write_text(json.dumps(facts))
    save_file({"mean": torch.full((config.num_layers, config.hidden_size), 0.5)}, folder / GATES_FILE)
    store.write_manifest(folder)
    shutil.copytree(tokenizer, run / "tokenizer")
    return folder


def export_small(folder: Path, tokenizer: Path) -> Path:
    """Export a small model with the tokenizer's vocabulary."""
    from fusiontree.export.exporter import export

    config = dataclasses.replace(SMALL, vocab_size=512)
    write_run(folder / "run", config, build(vocab_size=512).state_dict(), tokenizer, 0, 1)
    export(folder / "run", folder / "out")
    return folder / "out"


class Hostile:
    """A pickle that runs code: unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.makedirs, (str(self.mark), 0o777, True)
