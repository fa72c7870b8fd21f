"""Shapes and models that many tests share."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.build import build as build_shards
from data_tools.tokenizer import train_tokenizer
from fusiontree.data.format import Dataset, Manifest, ShardInfo, TokenizerInfo
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.writer import SHARD_ROWS, ShardWriter
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM
from fusiontree.model.ops import Kernels

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may ask a hub
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our Triton kernels run on the CPU where a test asks for them

# small, yet with every kind of head; rows of the tests cross its chunk and its window
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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Workers of the suite share the cores; results must not depend on their number."""
    torch.set_num_threads(1)


def build(
    seed: int = 0, kernels: Kernels | None = None, dtype: torch.dtype | None = None, **changes: object
) -> HybridLM:
    """A small model whose gates are off their start, so that they matter; activations in `dtype`."""
    torch.manual_seed(seed)
    model = HybridLM(dataclasses.replace(SMALL, **changes), kernels, compute_dtype=dtype)
    for name, parameter in model.named_parameters():
        if "fusion.up" in name or name.endswith("fusion.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("srte.up"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def documents_of(rows: list[list[int]]) -> Documents:
    """Documents from their lengths, row by row."""
    numbers = [[i for i, length in enumerate(row) for _ in range(length)] for row in rows]
    return Documents.from_seq_idx(torch.tensor(numbers, dtype=torch.int32))


def write_split(
    folder: Path, split: str, rows: Iterable[PackedRow], source: str, shard_rows: int = SHARD_ROWS
) -> list[ShardInfo]:
    """Write all rows of a split of a dataset folder."""
    writer = ShardWriter(folder, split, source, shard_rows=shard_rows)
    writer.add(rows)
    return writer.finish()


def counting_dataset(folder: Path, rows: int, first: int, row_len: int = 32, tokenizer: str = "f") -> Dataset:
    """`rows` rows of two documents; every token tells its place: first + row_len * row + position."""
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

MICRO = {  # a model and a schedule that two ranks finish in seconds
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
    *arguments: object, code: int = 0, timeout: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would and check its exit code; no traceback may ever show."""
    command = [sys.executable, "-m", "fusiontree", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty text files that a small model can learn something from."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["tree", "gate", "branch", "scan", "window", "state", "token", "shard", "row", "fuse"]
    draw = random.Random(0)
    for number in range(50):
        lines = [" ".join(draw.choices(words, k=6)) + "." for _ in range(draw.randint(5, 120))]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 tokens trained on `corpus`."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([corpus], 300, folder)
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus` as a dataset folder with rows of 512 tokens and a tenth held out."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    build_shards([corpus], tokenizer_folder, folder, holdout=0.1, row_len=512)
    return folder


def settings(shards: Path, output: Path, **changes: object) -> list[str]:
    """Overrides of the tiny preset for a micro run under `output`; keys of `changes` use __ for dots."""
    values = {**MICRO, "output": output, "data.path": shards, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


MEASURED = {"tokens_per_s", "tflop_per_s", "memory_gib"}  # what two equal runs differ in


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics, without what was measured of the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
