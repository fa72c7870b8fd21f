"""A run that is killed at any point, even during a save, resumes and ends with the curve of an uninterrupted run."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ranks
from conftest import metrics, settings

from fusiontree.checkpoint import store
from fusiontree.run import incidents
from fusiontree.run.folder import list_checkpoints

CHANGES = {
    "model__hidden_size": 32,
    "model__num_layers": 1,
    "batch__tokens": 256,
    "batch__micro_rows": 1,
    "validation__every": 10,
    "schedule__steps": 60,
    "checkpoint__every": 2,
    "deepspeed": "zero2",
}


def kill(victim: int, where: str, number: int, report: Path) -> None:
    """SIGKILL rank `victim` at its `number`-th backward pass, or at a write, sync, rename or removal of its saves."""
    import shutil

    from fusiontree.checkpoint import saver
    from fusiontree.training.step import TrainingStep

    if os.environ["RANK"] != str(victim):
        return
    count = 0

    def counted(kind: str, function: Callable) -> Callable:
        def counting(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                report.write_text(kind)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counting

    if where == "update":
        TrainingStep._backward = counted("update", TrainingStep._backward)
        return
    if where == "write":
        saver._Hashing.write = counted("write", saver._Hashing.write)
        return

    def work(self: saver.Saver, *arguments: object) -> None:  # from the first save on
        for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            if getattr(module, name).__name__ != "counting":
                setattr(module, name, counted(name, getattr(module, name)))
        return original(self, *arguments)

    original, saver.Saver._work = saver.Saver._work, work


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(("size", "kills", "seed"), [(1, 20, 0), (2, 6, 44)])  # seeds that reach all kinds
def test_a_run_killed_many_times_ends_with_the_uninterrupted_curve(
    size: int, kills: int, seed: int, shards: Path, tmp_path: Path
) -> None:
    ranks.run(["train", "tiny", *settings(shards, tmp_path, name="reference", **CHANGES)], tmp_path, size)
    words = ["train", "tiny", *settings(shards, tmp_path, name="killed", **CHANGES)]
    run, draw, killed_in = tmp_path / "killed", random.Random(seed), []
    damages = [flip, Path.unlink, cut][: kills // 6]
    expected = len(damages)
    for number in range(kills):
        victim = number % size
        where, at = draw.choice(
            [
                ("update", draw.randint(1, 8)),
                ("write", draw.randint(1, 200 // size)),
                ("rename", draw.randint(1, 4 if victim else 30)),  # only rank 0 renames checkpoints
            ]
        )
        job = ranks.start(words, tmp_path, size, partial(kill, victim, where, at, tmp_path / "report"))
        codes = job.codes()
        assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(size)], (
            f"{number} {victim} {where} {at}: {codes}\n{job.output()}"
        )
        killed_in.append((tmp_path / "report").read_text())
        saved = list_checkpoints(run / "checkpoints")
        assert any(not store.verify(path) for path in saved) or not saved
        if number % 4 == 3 and len(saved) > 1 and damages:
            damages.pop()(max(saved[-1].glob("*.pt"), key=lambda path: path.stat().st_size))
    ranks.run(words, tmp_path, size)
    assert metrics(run) == metrics(tmp_path / "reference")
    assert {"update", "write", "fsync", "replace"} <= {*killed_in}
    assert damages == []
    assert len([line for line in incidents.read(run) if line["kind"] == "fallback"]) >= expected
    names = [f"step-{step}" for step in (56, 58, 60)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *names]
    assert all(store.verify(run / "checkpoints" / name) == [] for name in names)
