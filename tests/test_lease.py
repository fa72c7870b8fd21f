"""The newest start of a run holds its folder; an older one that lives on puts nothing in its way."""

import subprocess
import sys

import pytest

from fusiontree.checkpoint import store
from fusiontree.config import load_config
from fusiontree.errors import RunError
from fusiontree.run import lease
from fusiontree.run.records import read_metrics
from fusiontree.training.metrics import Metrics

WHO = "from fusiontree.run import lease; print(lease.TOKEN)"
TAKE = "import sys; from pathlib import Path; from fusiontree.run import lease; lease.take(Path(sys.argv[1]))"


def in_a_new_process(code: str, *arguments: object) -> str:
    """What `code` prints there."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def take_elsewhere(folder) -> None:
    """Let another process take the lease and end."""
    in_a_new_process(TAKE, folder)


def test_the_holder_may_write_until_another_takes_over(tmp_path):
    lease.check(tmp_path)  # nobody ever started: nothing to hold
    lease.take(tmp_path)
    lease.check(tmp_path)
    take_elsewhere(tmp_path)
    with pytest.raises(RunError, match=r"is now written by a newer start on .* \(pid \d+\); this one ends"):
        lease.check(tmp_path)
    lease.take(tmp_path)
    lease.check(tmp_path)


def test_whether_the_holder_lives_is_told_where_it_can_be_seen(tmp_path):
    assert lease.read(tmp_path) is None
    lease.take(tmp_path)
    assert lease.is_alive(lease.read(tmp_path)) is True
    assert lease.is_alive(lease.read(tmp_path) | {"host": "elsewhere"}) is None
    take_elsewhere(tmp_path)
    assert lease.is_alive(lease.read(tmp_path)) is False


def test_starts_that_write_the_same_step_never_meet_in_one_file(tmp_path):
    final = tmp_path / "step-8"
    folders = [store.partial_path(final, start) for start in (lease.TOKEN, in_a_new_process(WHO))]
    for folder in folders:
        folder.mkdir()
        (folder / "weights.pt").write_text(folder.name)
    store.put_in_place(folders[0], final)
    assert (final / "weights.pt").read_text() == folders[0].name
    store.tidy(tmp_path)  # as the next start does
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-8"]


def test_what_a_start_that_lost_the_run_writes_stays_out_of_the_way(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-4", ".step-8.partial"):
        (folder / name).mkdir(parents=True)
    (folder / "latest").write_text("step-4\n")
    lease.take(tmp_path)
    take_elsewhere(tmp_path)
    config = load_config("tiny", [f"output={tmp_path.parent}", f"name={tmp_path.name}"])
    with Metrics(config, None, None) as metrics, pytest.raises(RunError, match="newer start"):
        metrics.record({"step": 5, "loss": 1.0})
    assert read_metrics(tmp_path) == []
    with pytest.raises(RunError, match="newer start"):
        store.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-4\n"
    assert not (folder / "step-8").exists()
    lease.take(tmp_path)
    store.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-8\n"
