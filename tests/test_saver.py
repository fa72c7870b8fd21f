"""Asynchronous saves: a checkpoint is a snapshot of its step, and a full disk does not end the run."""

import errno
import itertools
import logging
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import ranks
import torch
from conftest import metrics, settings

from fusiontree.checkpoint import store
from fusiontree.config import load_config
from fusiontree.distributed.collectives import World
from fusiontree.run import incidents
from fusiontree.run.records import read_layers
from fusiontree.training.logs import log_to_file

SMALLER = {"model__hidden_size": 32, "validation__every": 0}
ROOM = 30_000  # bytes per file: enough for logs, too few for a checkpoint


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_disk_of_rank_1_for_the_first_save() -> None:
    """Give rank 1 a full disk for the first save, and rank 0 one for five lines of its metrics."""
    from fusiontree.checkpoint import saver
    from fusiontree.run import jsonlines

    append, appended = jsonlines._append, itertools.count()

    def append_line(path: Path, line: bytes) -> None:
        if next(appended) in range(2, 7):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, line)

    jsonlines._append = append_line
    if os.environ["RANK"] == "1":
        write, sizes = saver._write_files, [ROOM]

        def write_files(folder: Path, files: dict) -> dict:
            _limit(sizes.pop() if sizes else resource.RLIM_INFINITY)
            return write(folder, files)

        saver._write_files = write_files


def fill_disk_after_the_first_save() -> None:
    """Give the run a full disk from the second save on."""
    from fusiontree.checkpoint import saver

    write, sizes = saver._write_files, [resource.RLIM_INFINITY]

    def write_files(folder: Path, files: dict) -> dict:
        _limit(sizes.pop() if sizes else ROOM)
        return write(folder, files)

    saver._write_files = write_files


def test_a_save_that_fails_on_one_rank_is_reported_and_the_next_one_succeeds(shards: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", **SMALLER)]
    output = ranks.run(words, tmp_path, 2, setup=fill_disk_of_rank_1_for_the_first_save)
    folder = tmp_path / "r" / "checkpoints"
    failure = "step-4 could not be written: File too large; training continues, and the next save tries again"
    assert output.count(failure) == 1
    assert [(line["kind"], line["step"]) for line in incidents.read(tmp_path / "r")] == [("save_failed", 4)]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-8"]
    assert store.verify(folder / "step-8") == []
    assert [line["step"] for line in metrics(tmp_path / "r")] == [*range(1, 9)]
    assert [line["step"] for line in read_layers(tmp_path / "r")] == [4, 8]
    assert output.count("metrics.jsonl: No space left on device; lines are queued until they can be written") == 1


def test_log_lines_refused_by_a_full_disk_are_written_later(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = load_config("tiny", [f"output={tmp_path}", "name=r"])
    log, limits = logging.getLogger("fusiontree.test"), resource.getrlimit(resource.RLIMIT_FSIZE)
    with log_to_file(config, World(0, 1, torch.device("cpu"))):
        _limit(100)
        try:
            log.info("first %s", "x" * 200)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.info("second")
    assert capsys.readouterr().err == ""
    written = (tmp_path / "r" / "logs" / "rank-0.log").read_text()
    assert written.index("first " + "x" * 200) < written.index("second")


def test_a_failed_last_save_ends_the_run_and_keeps_the_previous_checkpoint(shards: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", checkpoint__keep_last=1, **SMALLER)]
    output = ranks.run(words, tmp_path, setup=fill_disk_after_the_first_save, code=1)
    assert "step-8 could not be written: File too large; free disk space and start again" in output
    folder = tmp_path / "r" / "checkpoints"
    assert store.newest(folder) == (folder / "step-4", {})
    assert (folder / "latest").read_text() == "step-4\n"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-4"]


def write_late() -> None:
    """Delay the files of the save until training has made three more updates."""
    from fusiontree.checkpoint import saver
    from fusiontree.training.step import TrainingStep

    write, update, is_past = saver._write_files, TrainingStep.update, threading.Event()

    def updated(self: TrainingStep, batches: list, step: int, *others: object) -> object:
        if step == 7:  # the last: three updates after the save
            is_past.set()
        return update(self, batches, step, *others)

    def write_files(folder: Path, files: dict) -> dict:
        assert is_past.wait(30), "training waits for the save"
        return write(folder, files)

    TrainingStep.update, saver._write_files = updated, write_files


def stop_after_step_4() -> None:
    """Save and exit at step 4, before any further update."""
    from fusiontree.distributed import signals
    from fusiontree.training.step import TrainingStep

    update = TrainingStep.update

    def counted(self: TrainingStep, batches: list, step: int, stop: bool, *watch: object) -> object:
        return update(self, batches, step, step == 3, *watch)

    TrainingStep.update = counted
    signals.requested = lambda: signal.SIGTERM


def test_a_checkpoint_is_a_snapshot_however_late_it_is_written(shards: Path, tmp_path: Path) -> None:
    for name, setup, code in (("late", write_late, 0), ("stopped", stop_after_step_4, 75)):
        words = ["train", "tiny", *settings(shards, tmp_path, name=name, deepspeed="zero2", **SMALLER)]
        ranks.run(words, tmp_path, setup=setup, code=code)
    files = [
        torch.load(path, weights_only=False)
        for name in ("late", "stopped")
        for path in sorted((tmp_path / name / "checkpoints" / "step-4").glob("*optim_states.pt"))
    ]
    late, stopped = (file["optimizer_state_dict"] for file in files)
    for group in range(2):
        key = "single_partition_of_fp32_groups"
        assert torch.equal(late[key][group], stopped[key][group])
        moments, expected = (states["base_optimizer_state"]["state"][group] for states in (late, stopped))
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments[name], expected[name]) for name in moments)
