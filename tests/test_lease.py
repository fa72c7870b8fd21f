"""The newest start of a run has the lease; a stale start that still runs cannot publish files."""

import subprocess
import sys

import pytest

from fusiontree.checkpoint import store
from fusiontree.config import load_config
from fusiontree.errors import RunError
from fusiontree.run import lease
from fusiontree.run.folder import LEASE_FILE
from fusiontree.run.records import read_metrics
from fusiontree.training.metrics import Metrics

WHO = "from fusiontree.run import lease; print(lease.TOKEN)"
TAKE = "import sys; from pathlib import Path; from fusiontree.run import lease; lease.take(Path(sys.argv[1]))"


def in_a_new_process(code: str, *arguments: object) -> str:
    """Run `code` in a new process and return its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def take_elsewhere(folder) -> None:
    """Take the lease in another process, which then exits."""
    in_a_new_process(TAKE, folder)


def test_the_holder_may_write_until_another_start_takes_the_lease(tmp_path):
    lease.check(tmp_path)  # the run never started: no lease
    lease.take(tmp_path)
    lease.check(tmp_path)
    take_elsewhere(tmp_path)
    with pytest.raises(RunError, match=r"is now written by a newer attempt on .* \(pid \d+\); this one ends"):
        lease.check(tmp_path)
    lease.take(tmp_path)
    lease.check(tmp_path)


def test_the_holders_liveness_is_known_on_its_own_host_only(tmp_path):
    assert lease.read(tmp_path) is None
    lease.take(tmp_path)
    assert lease.is_alive(lease.read(tmp_path)) is True
    assert lease.is_alive(lease.read(tmp_path) | {"host": "elsewhere"}) is None
    take_elsewhere(tmp_path)
    assert lease.is_alive(lease.read(tmp_path)) is False


def test_starts_that_write_the_same_step_never_share_a_file(tmp_path):
    final = tmp_path / "step-8"
    folders = [store.partial_path(final, start) for start in (lease.TOKEN, in_a_new_process(WHO))]
    for folder in folders:
        folder.mkdir()
        (folder / "weights.pt").write_text(folder.name)
    store.put_in_place(folders[0], final)
    assert (final / "weights.pt").read_text() == folders[0].name
    store.tidy(tmp_path)  # as the next start does
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-8"]


def test_a_start_that_lost_the_lease_publishes_nothing(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-4", ".step-8.partial"):
        (folder / name).mkdir(parents=True)
    (folder / "latest").write_text("step-4\n")
    lease.take(tmp_path)
    take_elsewhere(tmp_path)
    config = load_config("tiny", [f"output={tmp_path.parent}", f"name={tmp_path.name}"])
    with Metrics(config, None, None) as metrics, pytest.raises(RunError, match="newer attempt"):
        metrics.record({"step": 5, "loss": 1.0})
    assert read_metrics(tmp_path) == []
    with pytest.raises(RunError, match="newer attempt"):
        store.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-4\n"
    assert not (folder / "step-8").exists()
    lease.take(tmp_path)
    store.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-8\n"


def test_a_damaged_lease_ends_the_start_because_a_newer_one_may_be_writing(tmp_path):
    lease.take(tmp_path)
    path = tmp_path / LEASE_FILE
    path.write_text(path.read_text()[:20])
    with pytest.raises(RunError, match=r"lease.json is damaged \(it is not JSON\), so a newer attempt may be writing"):
        lease.check(tmp_path)
