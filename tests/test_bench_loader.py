"""`bench loader` reports every figure and computes it correctly; no test asserts a speed."""

import json
import time
from pathlib import Path

import pytest
from conftest import cli

from fusiontree.bench import loader
from fusiontree.bench.loader import bench_loader
from fusiontree.data.format import Dataset
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream

RATES = [
    *("rows_tokens_per_s", "batches_tokens_per_s"),
    *("webdataset_rows_tokens_per_s", "webdataset_batches_tokens_per_s"),
]
FIRST = ["first_batch_at_step_0_seconds", "first_batch_at_step_1000000000_seconds"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "REPEATS", 1)
    monkeypatch.setattr(loader, "SECONDS", 0.05)
    monkeypatch.setattr(loader, "MEMORY_BATCHES", 50)


def test_every_figure_is_reported(shards: Path) -> None:
    figures = json.loads(json.dumps(bench_loader(shards, seq_len=128, rows=2)))
    assert all(figures[name] > 0 for name in (*RATES, *FIRST))
    assert 0 < figures["next_floor"] < 1
    assert 0 < figures["next_share"] < 1
    assert 0 <= figures["waiting_share"] < 1
    assert set(figures["memory_bytes"]) == {"after_5_batches", "after_50_batches"}
    assert (figures["seq_len"], figures["rows_per_batch"], figures["workers"]) == (128, 2, 2)


def test_time_to_first_batch_includes_opening_the_dataset(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seek, opened = [], TrainStream.seek, Dataset.__init__
    monkeypatch.setattr(TrainStream, "seek", lambda stream, rows: (made.append(rows), seek(stream, rows)))
    monkeypatch.setattr(Dataset, "__init__", lambda *arguments: (time.sleep(0.05), opened(*arguments))[1])
    assert loader._first_batch(shards, 128, 2, 7) > 0.05
    assert made == [14]


def test_rate_is_tokens_per_cpu_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5])  # seconds of CPU time
    monkeypatch.setattr(loader.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(loader.time, "perf_counter", iter([0.0, 0.01, 0.1]).__next__)
    assert loader._rate(iter([1000, 30, 70, 500])) == 200  # the first is the warmup, the last comes after the end


def test_waiting_share_counts_only_calls_without_a_ready_batch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = TrainStream.places
    monkeypatch.setattr(loader, "CONSUMER", 1e9)
    monkeypatch.setattr(TrainStream, "places", lambda *arguments: time.sleep(0.005) or make(*arguments))
    sources = Sources({"": Dataset(shards)})
    assert loader._waiting(sources, 128, 1)["waiting_share"] > 0.5
    monkeypatch.setattr(TrainStream, "ready", True)
    assert loader._waiting(sources, 128, 1)["waiting_share"] == 0


def test_indivisible_length_is_refused_in_one_line(shards: Path) -> None:
    error = cli("bench", "loader", "--data", shards, "--seq-len", 100, code=2).stderr
    assert "100 does not divide the 512-token rows" in error
