"""A checkpoint is read only when every hash agrees; what is not whole is never taken for one."""

import hashlib
import json
from pathlib import Path

import pytest

from fusiontree import checkpoint
from fusiontree.errors import RunError, UserError


def make(folder: Path, step: int) -> Path:
    """A checkpoint of one weights file."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    contents = {"weights.pt": f"weights {step}", checkpoint.STATE: json.dumps({"step": step})}
    for name, text in contents.items():
        (path / name).write_text(text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    (path / checkpoint.MANIFEST).write_text(json.dumps({"sha256": hashes}))
    return path


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make(tmp_path, step)
    (tmp_path / ".step-11.partial").mkdir()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-10", [])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "weights.pt").write_text("other"), "weights.pt does not match its sha256"),
        (lambda path: (path / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda path: (path / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
        (lambda path: (path / checkpoint.MANIFEST).write_text("{"), "manifest.json is missing or unreadable"),
        (
            lambda path: (path / checkpoint.MANIFEST).write_text('{"sha256": {"../x": "0"}}'),
            "../x leaves the checkpoint's folder",
        ),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(damage: object, words: str, tmp_path: Path) -> None:
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    assert checkpoint.verify(newest) == []
    damage(newest)  # type: ignore[operator]
    assert words in checkpoint.verify(newest)[0]
    found, lines = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-1"
    assert "step-2 is damaged and passed over" in lines[0]


def test_when_none_verifies_the_run_stops(tmp_path: Path) -> None:
    (make(tmp_path, 1) / "weights.pt").unlink()
    with pytest.raises(RunError, match="no checkpoint under .* verifies"):
        checkpoint.newest(tmp_path)


def test_a_run_or_a_checkpoint_stands_for_a_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoints", 3)
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(path) == path
    with pytest.raises(UserError, match="no run or checkpoint at"):
        checkpoint.resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.resolve(tmp_path / "empty")
    (path / "weights.pt").unlink()
    with pytest.raises(RunError, match="does not verify"):
        checkpoint.resolve(path)


def test_retention_keeps_the_newest_and_drops_what_training_fell_back_from(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    checkpoint._retain(tmp_path, tmp_path / "step-15", keep_last=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-10", "step-15"]
    checkpoint._retain(tmp_path, tmp_path / "step-10", keep_last=1)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-10"]


def test_what_a_save_left_that_never_ended_is_cleared(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / ".step-2.partial").mkdir()
    checkpoint.clear_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
