"""Killed at any moment, in the middle of a save too, a run goes on and ends with the very curve it would have had."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ranks
from conftest import metrics, settings

from fusiontree import checkpoint, incidents

KILLS = 20
CHANGES = {
    "model__hidden_size": 32,
    "model__num_layers": 1,
    "batch__tokens": 256,
    "validation__every": 10,
    "schedule__steps": 60,
    "checkpoint__every": 2,
    "deepspeed": "zero2",
}


def kill(where: str, number: int, told: Path) -> None:
    """SIGKILL this process at the `number`-th backward pass, or write, sync, rename or removal of the saves."""
    import shutil

    from fusiontree import saver
    from fusiontree.training.step import TrainingStep

    count = 0

    def counted(kind: str, function: Callable) -> Callable:
        def counting(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                told.write_text(kind)
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


def test_a_run_killed_twenty_times_ends_with_the_curve_of_one_that_was_not(shards: Path, tmp_path: Path) -> None:
    ranks.run(["train", "tiny", *settings(shards, tmp_path, name="whole", **CHANGES)], tmp_path)
    words = ["train", "tiny", *settings(shards, tmp_path, name="killed", **CHANGES)]
    run, draw, killed_in, damages = tmp_path / "killed", random.Random(0), [], [flip, Path.unlink, cut]
    for number in range(KILLS):
        where, at = draw.choice(
            [("update", draw.randint(1, 8)), ("write", draw.randint(1, 200)), ("rename", draw.randint(1, 30))]
        )
        job = ranks.start(words, tmp_path, setup=partial(kill, where, at, tmp_path / "told"))
        (code,) = job.codes()
        assert code == -signal.SIGKILL, f"{number} {where} {at}: {code}\n{job.said()}"
        killed_in.append((tmp_path / "told").read_text())
        saved = checkpoint.list_checkpoints(run / "checkpoints")
        assert any(not checkpoint.verify(path) for path in saved) or not saved
        if number % 4 == 3 and len(saved) > 1 and damages:
            damages.pop()(max(saved[-1].glob("*.pt"), key=lambda path: path.stat().st_size))
    ranks.run(words, tmp_path)
    assert metrics(run) == metrics(tmp_path / "whole")
    assert {*killed_in} == {"update", "write", "fsync", "replace", "rmtree"}
    assert damages == []
    assert len([line for line in incidents.read(run) if line["kind"] == "fallback"]) >= 3
    names = [f"step-{step}" for step in (56, 58, 60)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *names]
    assert all(checkpoint.verify(run / "checkpoints" / name) == [] for name in names)
