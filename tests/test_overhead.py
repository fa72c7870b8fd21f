"""The overhead compares the run and the bare loop on the same rows, block by block."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO, cli, settings

from fusiontree.bench import overhead
from fusiontree.bench.overhead import BLOCK, _AlternatingStream, _RoundsDone
from fusiontree.config import load_config
from fusiontree.data.batch import Batch
from fusiontree.distributed.collectives import World
from fusiontree.errors import UserError

SHAPE = [f"{key}={value}" for key, value in MICRO.items() if key.startswith(("model.", "data.", "batch."))]


class Recorder:
    """Stand-in for the bare loop."""

    def __init__(self) -> None:
        self.seen: list[list[Batch]] = []

    def update(self, batches: list[Batch]) -> None:
        self.seen.append(batches)


def test_the_bare_loop_trains_on_the_rows_of_each_block_of_the_run(shards: Path, tmp_path: Path) -> None:
    config = load_config("tiny", settings(shards, tmp_path, validation__every=0))
    bare, given = Recorder(), []
    stream = _AlternatingStream(config, World(0, 1, torch.device("cpu")), bare, rounds=3)  # type: ignore[arg-type]
    for _ in range(3 * BLOCK):
        given.append(next(stream))
        complete = (len(given) - 1) // BLOCK  # completed blocks of the run; the bare loop precedes every second one
        assert len(bare.seen) == (complete + complete % 2) * BLOCK
    with pytest.raises(_RoundsDone):
        next(stream)
    stream.close()
    assert len(given) == len(bare.seen) == 3 * BLOCK
    for ours, theirs in zip(given, bare.seen, strict=True):
        assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True))
    assert len(stream.pairs) == 3


def test_the_command_measures_a_complete_run_on_synthetic_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--rounds", 2, "--warmup", 0, "--json", tmp_path / "o.json"]
    done = cli("bench", "overhead", "tiny", *SHAPE, "batch.tokens=256", "logging.every=50", *options)
    figures = json.loads((tmp_path / "o.json").read_text())
    assert "overhead" in done.stdout
    assert (figures["rounds"], figures["updates_per_block"], figures["batch_tokens"]) == (2, BLOCK, 256)
    assert figures["logging_every"] == BLOCK  # at least once per block, whatever the preset says
    for loop in ("run_update", "bare_update"):
        assert 0 < figures[loop]["min_seconds"] <= figures[loop]["median_seconds"] <= figures[loop]["max_seconds"]
    low, high = (figures["run_update"][f"{end}_seconds"] for end in ("min", "max"))
    assert low / figures["bare_update"]["max_seconds"] - 1 <= figures["overhead"]["median"]
    assert figures["overhead"]["median"] <= high / figures["bare_update"]["min_seconds"] - 1


def test_the_overhead_is_the_median_ratio_of_the_rounds() -> None:
    def pair(ours: float, bare: float) -> tuple[overhead.Seconds, overhead.Seconds]:
        return overhead.Seconds(ours, 2 * ours), overhead.Seconds(bare, bare)

    figures = overhead._figures([pair(2.2, 2.0), pair(9.0, 3.0), pair(1.0, 1.0)])
    assert figures["overhead"]["median"] == pytest.approx(0.1)
    assert figures["overhead_of_cpu_time"]["median"] == pytest.approx(1.2)
    assert figures["run_update"]["median_seconds"] == statistics.median([2.2, 9.0, 1.0]) / BLOCK


def test_numbers_out_of_range_are_refused() -> None:
    for words in ({"rounds": 0}, {"warmup": -1}):
        with pytest.raises(UserError, match="it must be at least"):
            overhead.bench_overhead("tiny", [], **words)
