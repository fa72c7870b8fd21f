"""The newest start of a run holds its folder; an older one that lives on puts nothing in its way."""

import subprocess
import sys

import pytest

from fusiontree import checkpoint, lease
from fusiontree.errors import RunError

TAKE = "import sys; from pathlib import Path; from fusiontree import lease; lease.take(Path(sys.argv[1]))"


def take_elsewhere(folder) -> None:
    """Let another process take the lease and end."""
    subprocess.run([sys.executable, "-c", TAKE, str(folder)], check=True)


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


def test_a_checkpoint_of_a_start_that_lost_the_run_stays_out_of_the_way(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-4", ".step-8.partial"):
        (folder / name).mkdir(parents=True)
    (folder / "latest").write_text("step-4\n")
    lease.take(tmp_path)
    take_elsewhere(tmp_path)
    with pytest.raises(RunError, match="newer start"):
        checkpoint.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-4\n"
    assert not (folder / "step-8").exists()
    lease.take(tmp_path)
    checkpoint.put_in_place(folder / ".step-8.partial", folder / "step-8")
    assert (folder / "latest").read_text() == "step-8\n"
