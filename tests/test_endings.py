"""A launched run that hangs, is killed or is stopped leaves no process and no shared memory, and resumes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import metrics, settings

from fusiontree.checkpoint import store
from fusiontree.run import incidents
from fusiontree.run.folder import list_checkpoints, step_of

CHANGES = {
    "model__hidden_size": 32,
    "validation__every": 0,
    "schedule__steps": 10_000,
    "checkpoint__every": 8,
    "health__hang_seconds": 4,
    "checkpoint__keep_last": 1,
    "deepspeed": "zero2",
}
CHAIN = 4  # processes of a launch of two ranks: DeepSpeed's runner, its launcher, the ranks


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


class Launch:
    """`fusiontree launch` with two ranks, and all processes that it has started."""

    def __init__(self, words: list[str], folder: Path):
        self.errors, environment = folder / "errors", os.environ | {"TMPDIR": str(folder)}
        before = {*folder.glob("fusiontree-launch-*")}
        with open(self.errors, "w") as stream:
            command = [sys.executable, "-m", "fusiontree", "launch", "tiny", "--local", "2", *words]
            self.process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        wait_until(lambda: {*folder.glob("fusiontree-launch-*")} - before)
        (self.folder,) = {*folder.glob("fusiontree-launch-*")} - before

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        return int((self.folder / f"rank-{number}.started").read_text().split()[1])

    def family(self) -> list[int]:
        """Return the live processes whose environment names the launch's folder: its own and their descendants."""
        mark, found = f"FUSIONTREE_LAUNCH={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def shared_memory(self) -> set[Path]:
        """Return the files in /dev/shm that the processes have mapped."""
        maps = "".join((Path("/proc") / str(pid) / "maps").read_text() for pid in self.family())
        return {Path(line[line.index("/dev/shm/") :]) for line in maps.splitlines() if "/dev/shm/" in line}

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and standard error."""
        code = self.process.wait(90)
        assert self.family() == []
        return code, self.errors.read_text()


@pytest.fixture
def launch(shards: Path, tmp_path: Path) -> Iterator[Callable[[], Launch]]:
    """Return a function that starts or resumes the run `r` and waits for ten updates; kill the leftovers."""
    launches: list[Launch] = []
    words, run = settings(shards, tmp_path, name="r", **CHANGES), tmp_path / "r"

    def start() -> Launch:
        saved = list_checkpoints(run / "checkpoints")
        goal = 10 + (step_of(saved[-1]) if saved else 0)
        launches.append(made := Launch(words, tmp_path))
        wait_until(lambda: made.process.poll() is None and len(made.family()) == CHAIN)
        wait_until(lambda: last_step(made, run) >= goal)
        return made

    yield start
    for made in launches:
        for pid in [made.process.pid, *made.family()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.process.wait()


def last_step(made: Launch, run: Path) -> int:
    """Return the last step that the launch has written to the metrics."""
    assert made.process.poll() is None, made.errors.read_text()
    if not (made.folder / "rank-0.started").exists() or not (run / "metrics.jsonl").exists():
        return 0
    written = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(written[-2])["step"] if len(written) > 1 else 0


def test_no_process_outlives_a_run_that_hangs_or_is_killed_or_stopped(launch: Callable, tmp_path: Path) -> None:
    run = tmp_path / "r"

    hung = launch()
    mapped = hung.shared_memory()
    os.kill(hung.rank(0), signal.SIGSTOP)
    code, output = hung.wait()
    assert code == 76, output
    assert "error: rank 1: step " in output
    assert (run / "logs" / "stacks-rank-1.txt").exists()
    (incident,) = incidents.read(run)
    assert (incident["kind"], incident["silent"]) == ("hang", [0])
    assert incident["message"].endswith("; no answer from rank 0")

    orphaned = launch()
    mapped |= orphaned.shared_memory()
    orphaned.process.kill()
    wait_until(lambda: orphaned.family() == [])
    step = metrics(run)[-1]["step"]
    assert store.newest(run / "checkpoints") == (run / "checkpoints" / f"step-{step}", {})

    stopped = launch()
    stopped.process.terminate()
    code, output = stopped.wait()
    assert code == 75, output
    assert f"stopped by SIGTERM after step {metrics(run)[-1]['step']:,}, which is saved" in output
    assert metrics(run)[-1]["step"] > step

    killed = launch()
    os.kill(killed.rank(1), signal.SIGKILL)
    code, output = killed.wait()
    assert code == 1, output
    # "was killed by SIGKILL", or, if the launch noticed rank 0 first, "died" without a cause
    assert "error: rank 1 " in output
    assert f"the last lines of {run / 'logs' / 'rank-1.log'}:" in output
    assert not [path for path in mapped if path.exists()]
    assert [line["kind"] for line in incidents.read(run)] == ["hang", "resume", "signal", "resume", "signal", "resume"]
