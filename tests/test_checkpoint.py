"""Checkpoints: verification, selection of the newest, retention, interrupted saves."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_lease import take_elsewhere

from fusiontree.checkpoint import store
from fusiontree.checkpoint.saver import Retention, _retain, _seal
from fusiontree.errors import RunError, UserError
from fusiontree.run import incidents, lease
from fusiontree.run.folder import CONFIG_FILE, GATES_FILE, MANIFEST_FILE, STATE_FILE, list_checkpoints


def state_of(step: int) -> dict:
    """Return the state of a checkpoint, as training saves it."""
    state: dict = {"step": step, "tokens": 9, "rows_consumed": 3, "world_size": 1, "zero_stage": 0}
    state |= {"data_fingerprint": "d", "tokenizer_fingerprint": "t", "eos_id": 0, "pad_id": 1, "wandb_id": None}
    return state | {"left_out": [[4, 8]], "bad_rows": [], "health": {"skipped": 0, "bad": [], "losses": [2.5]}}


def changed(**values: object) -> str:
    """Return the state of step 3 with other values, as JSON."""
    return json.dumps(state_of(3) | values)


def make_checkpoint(folder: Path, step: int) -> Path:
    """Create a checkpoint with one weights file."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    contents = {"weights.pt": f"weights {step}", STATE_FILE: json.dumps(state_of(step))}
    contents |= dict.fromkeys((CONFIG_FILE, GATES_FILE), "")
    for name, text in contents.items():
        (path / name).write_text(text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    (path / MANIFEST_FILE).write_text(json.dumps({"sha256": hashes}))
    return path


def test_newest_sorts_steps_by_number_and_ignores_partial_folders(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".step-11.partial").mkdir()
    assert store.newest(tmp_path) == (tmp_path / "step-10", {})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "weights.pt").write_text("other"), "weights.pt does not match its sha256"),
        (lambda path: (path / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda path: (path / MANIFEST_FILE).unlink(), "manifest.json is missing"),
        (lambda path: (path / MANIFEST_FILE).write_text("{"), "manifest.json is damaged (it is not JSON)"),
        (
            lambda path: (path / MANIFEST_FILE).write_text('{"sha256": {"../x": "0"}}'),
            "'../x' is outside the checkpoint's folder",
        ),
        (lambda path: (path / MANIFEST_FILE).write_text('{"sha256": []}'), "sha256 must be an object"),
        (lambda path: (path / MANIFEST_FILE).write_text('{"sha256": {}}'), "config.yaml is not in manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(damage: object, words: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2)
    assert store.verify(newest) == []
    damage(newest)  # type: ignore[operator]
    assert words in store.verify(newest)[0]
    found, lines = store.newest(tmp_path)
    assert found == tmp_path / "step-1"
    assert "step-2 is damaged and skipped" in lines[newest]


def test_a_run_stops_if_no_checkpoint_verifies(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 1) / "weights.pt").unlink()
    with pytest.raises(RunError, match="no valid checkpoint under"):
        store.newest(tmp_path)


def test_resolve_accepts_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    def resolve(source: Path) -> Path:
        with ExitStack() as pins:
            return store.resolve(source, pins)

    path = make_checkpoint(tmp_path / "checkpoints", 3)
    assert resolve(tmp_path) == resolve(path) == path
    with pytest.raises(UserError, match="no run or checkpoint at"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        resolve(tmp_path / "empty")
    (path / "weights.pt").unlink()
    with pytest.raises(RunError, match="is damaged: weights.pt is missing"):
        resolve(path)
    (path / MANIFEST_FILE).unlink()
    with pytest.raises(RunError, match="is damaged: manifest.json is missing"):
        resolve(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 3, "tokens": 9}', "it lacks rows_consumed, world_size, zero_stage"),
        ("3", "it is not a JSON object"),
        ("", "it is empty"),
        (changed(step=float("nan")), "step must be a valid integer"),
        (changed(step=10**18), "step must be less than 9007199254740992"),
        (changed(step=4), "it is of step 4"),
        (changed(rows_consumed=-1), "rows_consumed must be greater than or equal to 0"),
        (changed(zero_stage=True), "zero_stage must be a valid integer"),
        (changed(left_out=[[8, 4]]), "left_out.0 must not end before it starts"),
        (changed(bad_rows=[{"source": "a"}]), "it lacks bad_rows.0.shard"),
        (changed(health={"skipped": 0, "bad": [], "losses": ["x"]}), "health.losses.0 must be a valid number"),
    ],
)
def test_an_invalid_state_is_refused_even_if_its_hash_is_right(text: str, words: str, tmp_path: Path) -> None:
    older, path = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    (path / STATE_FILE).write_text(text)
    store.write_manifest(path)
    with pytest.raises(RunError, match=re.escape(words)):
        store.read_state(path)
    found, damaged = store.newest(tmp_path)
    assert found == older
    assert f"state.json is damaged ({words}" in damaged[path]


def test_retention_keeps_the_newest_and_removes_later_steps(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make_checkpoint(tmp_path, step)
    _retain(tmp_path / "step-15", Retention(keep_last=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-15"]
    _retain(tmp_path / "step-10", Retention(keep_last=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10"]


def test_old_checkpoints_are_removed_only_after_the_new_one_is_read_back(tmp_path: Path) -> None:
    before, final = make_checkpoint(tmp_path, 1), tmp_path / "step-2"
    rest = dict.fromkeys((CONFIG_FILE, GATES_FILE), b"") | {STATE_FILE: json.dumps(state_of(2)).encode()}

    def seal(written: bytes) -> None:
        partial = store.partial_path(final, "me")
        partial.mkdir(exist_ok=True)
        (partial / "weights.pt").write_bytes(written)
        hashes = {"weights.pt": hashlib.sha256(b"weights 2").hexdigest()}
        _seal(partial, final, hashes, rest, Retention(keep_last=1))

    with pytest.raises(OSError, match=r"weights\.pt does not match its sha256 when read back"):
        seal(b"weights ?")
    assert store.newest(tmp_path) == (before, {})
    seal(b"weights 2")
    assert list_checkpoints(tmp_path) == [final]


def test_keep_every_keeps_checkpoints_forever(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10, 12, 14):
        make_checkpoint(tmp_path, step)
    _retain(tmp_path / "step-14", Retention(keep_last=2, keep_every=4))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4", "step-8", "step-12", "step-14"]


def test_tidy_cleans_up_interrupted_saves(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    (tmp_path / ".step-2.partial").mkdir()
    (tmp_path / ".latest.partial-7").touch()
    make_checkpoint(tmp_path, 3).rename(tmp_path / ".step-3.old")  # killed between two renames
    make_checkpoint(tmp_path, 4)
    (tmp_path / ".step-4.old").mkdir()  # killed before it was removed
    make_checkpoint(tmp_path, 5).rename(tmp_path / ".step-5.old")  # as step 3, but its successor is damaged
    (make_checkpoint(tmp_path, 5) / "weights.pt").write_text("other")
    (tmp_path / ".step-0.me.removed").mkdir()
    store.restore_replaced(tmp_path)
    store.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3", "step-4", "step-5"]
    assert store.verify(tmp_path / "step-5") == []


def test_a_repeated_step_replaces_its_old_checkpoint(tmp_path: Path) -> None:
    final = make_checkpoint(tmp_path, 3)
    (final / "weights.pt").write_text("old")
    make_checkpoint(tmp_path / "new", 3).rename(store.partial_path(final, "me"))
    store.put_in_place(store.partial_path(final, "me"), final)
    assert store.verify(final) == []
    assert (tmp_path / "latest").read_text() == "step-3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "new", "step-3"]


def run_with_checkpoints(run: Path, *steps: int) -> Path:
    """Create a run's checkpoints and take its lease; return the folder of the checkpoints."""
    for step in steps:
        make_checkpoint(run / "checkpoints", step)
    lease.take(run)
    return run / "checkpoints"


def test_a_checkpoint_that_was_moved_and_linked_loses_only_its_link(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path / "run", 1, 2, 3)
    (folder / "step-1").rename(tmp_path / "archived")
    (folder / "step-1").symlink_to(tmp_path / "archived")
    _retain(folder / "step-3", Retention(keep_last=1))
    assert list_checkpoints(folder) == [folder / "step-3"]
    assert store.verify(tmp_path / "archived") == []


def test_a_failed_removal_is_recorded_once_and_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_with_checkpoints(tmp_path / "run", 1, 2, 3)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source == folder / "step-1":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        _retain(folder / "step-3", Retention(keep_last=1))
    assert list_checkpoints(folder) == [folder / "step-1", folder / "step-3"]
    message = f"checkpoint {folder / 'step-1'} could not be removed: Device or resource busy; remove it by hand"
    assert capsys.readouterr().err == message + "\n"
    assert [(line["kind"], line["message"]) for line in incidents.read(tmp_path / "run")] == [
        ("removal_failed", message)
    ]


def test_a_stale_attempt_removes_no_checkpoint(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path / "run", 1, 2)
    take_elsewhere(tmp_path / "run")
    with pytest.raises(RunError, match="newer attempt"):
        _retain(folder / "step-2", Retention(keep_last=1))
    assert list_checkpoints(folder) == [folder / "step-1", folder / "step-2"]


READER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from fusiontree.checkpoint import store
with ExitStack() as pins:
    print(store.newest(Path(sys.argv[1]), pins)[0].name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_checkpoint_that_another_process_reads_is_removed_later(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path / "run", 1)
    command = [sys.executable, "-c", READER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "step-1\n"
        make_checkpoint(folder, 2)
        _retain(folder / "step-2", Retention(keep_last=1))
        assert store.verify(folder / "step-1") == []
        reader.communicate("")
    assert reader.returncode == 0
    _retain(folder / "step-2", Retention(keep_last=1))
    assert sorted(path.name for path in folder.iterdir()) == ["step-2"]


def test_a_checkpoint_that_is_removed_before_it_is_pinned_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_with_checkpoints(tmp_path / "run", 1)
    pinned = store.pinned

    def remove_first(checkpoint: Path) -> object:
        if checkpoint == folder / "step-1":
            make_checkpoint(folder, 2)
            store.remove(checkpoint)
        return pinned(checkpoint)

    monkeypatch.setattr(store, "pinned", remove_first)
    assert store.newest(folder) == (folder / "step-2", {})


def test_a_reader_learns_that_its_checkpoint_was_replaced(tmp_path: Path) -> None:
    final = make_checkpoint(tmp_path, 3)
    make_checkpoint(tmp_path / "new", 3).rename(store.partial_path(final, "me"))
    with pytest.raises(RunError, match="was replaced while it was read"), store.pinned(final):
        store.put_in_place(store.partial_path(final, "me"), final)
