"""After a stop signal all ranks save and exit with code 75; the same command resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ranks
from conftest import metrics, settings
from test_resize import ask_to_stop

from fusiontree.checkpoint import store
from fusiontree.distributed import outcome
from fusiontree.run import incidents
from fusiontree.run.folder import list_checkpoints
from launcher import rank_reports

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


# a rank in its phase argv[1] whose main thread waits in C: it locks a mutex twice, which no signal interrupts
WAITING = """
import ctypes, sys
from fusiontree.distributed import signals
signals.REPEAT = 0.2
signals.listen()
if sys.argv[1] == "training":
    signals.defer()
print("up", flush=True)
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Return a function that starts `WAITING`, with a launch folder of its own."""
    processes = []

    def start(phase: str) -> subprocess.Popen[str]:
        environment = os.environ | {outcome.LAUNCH_FOLDER: str(tmp_path), "RANK": "3"}
        command = [sys.executable, "-c", WAITING, phase]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        assert processes[-1].stdout.readline() == "up\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_kills_a_rank_that_waits_in_c(number, waiting, tmp_path) -> None:
    process = waiting("training")
    process.send_signal(number)
    process.send_signal(number)  # a repetition, by a scheduler that signals a process twice
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=10) == -number
    assert rank_reports.read(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_a_rank_at_once(number, waiting, tmp_path) -> None:
    process = waiting("starting")
    process.send_signal(number)
    assert process.wait(timeout=10) == 75
    (report,) = rank_reports.read(tmp_path)
    message = f"stopped by {number.name} before the first step; start again"
    assert (report["rank"], report["code"], report["message"]) == (3, 75, message)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_run_that_is_stopped_while_it_starts_exits_with_75_and_starts_again(resuming, shards, tmp_path) -> None:
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", schedule__steps=2, **SMALLER)]
    if resuming:
        ranks.run(words, tmp_path, 2, setup=ask_to_stop, code=75)
    job = ranks.start(words, tmp_path, 2, setup=hang_in_setup)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"hanging-{process.pid}").exists() for process in job.processes):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)
    for process in job.processes:
        os.kill(process.pid, signal.SIGUSR1)
    assert job.codes(10) == [75, 75], job.output()
    assert job.output().count("stopped by SIGUSR1 before the first step; start again") == 2
    ranks.run(words, tmp_path, 2)
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]


def hang_in_setup() -> None:
    """Hang in the construction of the engine, the last part of a start."""
    from fusiontree.training import trainer

    def hang(config, world, resuming):
        (config.output / f"hanging-{os.getpid()}").touch()
        time.sleep(600)

    trainer.TrainingStep = hang


def stubborn() -> None:
    """Ignore stop requests, and accept a second signal as a repetition after 0.1 s."""
    from fusiontree.distributed import signals

    signals.REPEAT = 0.1
    signals.requested = lambda: None
