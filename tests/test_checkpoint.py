"""Checkpoints: verification, selection of the newest, retention, interrupted saves."""

import hashlib
import json
from pathlib import Path

import pytest

from fusiontree.checkpoint import store
from fusiontree.checkpoint.saver import Retention, _retain, _seal
from fusiontree.errors import RunError, UserError
from fusiontree.run.folder import CONFIG_FILE, GATES_FILE, MANIFEST_FILE, STATE_FILE, list_checkpoints


def make_checkpoint(folder: Path, step: int) -> Path:
    """Create a checkpoint with one weights file."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    contents = {"weights.pt": f"weights {step}", STATE_FILE: json.dumps({"step": step})}
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
        (lambda path: (path / MANIFEST_FILE).write_text("{"), "manifest.json is missing or unreadable"),
        (
            lambda path: (path / MANIFEST_FILE).write_text('{"sha256": {"../x": "0"}}'),
            "../x is outside the checkpoint's folder",
        ),
        (lambda path: (path / MANIFEST_FILE).write_text('{"sha256": []}'), "config.yaml is not in manifest.json"),
        (lambda path: (path / MANIFEST_FILE).write_text('{"sha256": 3}'), "manifest.json is missing or unread"),
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
    path = make_checkpoint(tmp_path / "checkpoints", 3)
    assert store.resolve(tmp_path) == store.resolve(path) == path
    with pytest.raises(UserError, match="no run or checkpoint at"):
        store.resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        store.resolve(tmp_path / "empty")
    (path / "weights.pt").unlink()
    with pytest.raises(RunError, match="is damaged: weights.pt is missing"):
        store.resolve(path)
    (path / MANIFEST_FILE).unlink()
    with pytest.raises(RunError, match="is damaged: manifest.json is missing"):
        store.resolve(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"step": 3, "tokens": 9}', "lacks rows_consumed, world_size, zero_stage"), ("3", "is damaged")],
)
def test_a_state_without_required_keys_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    (path / STATE_FILE).write_text(text)
    with pytest.raises(RunError, match=f"state.json {words}"):
        store.read_state(path)


def test_retention_keeps_the_newest_and_removes_later_steps(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make_checkpoint(tmp_path, step)
    _retain(tmp_path / "step-15", Retention(keep_last=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-15"]
    _retain(tmp_path / "step-10", Retention(keep_last=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10"]


def test_old_checkpoints_are_removed_only_after_the_new_one_is_read_back(tmp_path: Path) -> None:
    before, final = make_checkpoint(tmp_path, 1), tmp_path / "step-2"
    rest = dict.fromkeys((CONFIG_FILE, STATE_FILE, GATES_FILE), b"")

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
