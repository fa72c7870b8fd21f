"""After a stop signal all ranks save and exit with code 75; the same command resumes."""

import os
import signal
import time
from pathlib import Path

import pytest
import ranks
from conftest import metrics, settings

from fusiontree.checkpoint import store
from fusiontree.run import incidents
from fusiontree.run.folder import list_checkpoints

SMALLER = {"model__hidden_size": 32, "validation__every": 0, "checkpoint__every": 1000, "schedule__warmup_steps": 0}


def wait_for_step(run: Path, step: int, job: ranks.Job) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not metrics(run) or metrics(run)[-1]["step"] < step:
        assert time.monotonic() < deadline, job.output()
        assert all(process.is_alive() for process in job.processes), job.output()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "to"), [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_a_signal_to_any_rank_saves_on_all_ranks(
    number: signal.Signals, to: list[int], shards: Path, tmp_path: Path
) -> None:
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", schedule__steps=10_000, **SMALLER)]
    job = ranks.start(words, tmp_path, 2)
    run = tmp_path / "r"
    wait_for_step(run, 3, job)
    for rank in to:
        os.kill(job.processes[rank].pid, number)
    assert job.codes() == [75, 75], job.output()
    (path,) = list_checkpoints(run / "checkpoints")
    assert store.verify(path) == []
    step = metrics(run)[-1]["step"]
    assert path.name == f"step-{step}"
    assert job.output().count(f"stopped by {number.name} after step {step:,}, which is saved") == 2
    (incident,) = incidents.read(run)
    assert (incident["kind"], incident["step"]) == ("signal", step)


def test_a_second_signal_kills(shards: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", schedule__steps=10_000, **SMALLER)]
    job = ranks.start(words, tmp_path, setup=stubborn)
    wait_for_step(tmp_path / "r", 1, job)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    assert job.codes(10) == [-signal.SIGTERM]


def stubborn() -> None:
    """Ignore stop requests, and accept a second signal as a repetition after 0.1 s."""
    from fusiontree.distributed import signals

    signals.REPEAT = 0.1
    signals.requested = lambda: None
