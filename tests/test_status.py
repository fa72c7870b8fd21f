"""Status of a run, from its folder alone and with SLURM's queue."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from fusiontree import cli
from fusiontree.config import load_config, to_yaml
from fusiontree.run import incidents, lease
from fusiontree.run.folder import LEASE_FILE
from launcher.status import status

SCONTROL = """#!/bin/sh
echo "JobId=$4 JobState=$STATE Reason=Priority RunTime=00:01:02 TimeLimit=04:00:00"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return the folder of a half-finished run whose process has ended, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-480").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("tiny", ["schedule.steps=1000"])))
    lines = [
        {"step": 400, "tokens": 4, "val_loss": 3.5},
        {"step": 500, "tokens": 5, "loss": 3.25, "lr": 1e-3, "grad_norm": 1.0, "gate_mean": 0.5, "tokens_per_s": 100.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "latest").write_text("step-480\n")
    code = "import sys; from pathlib import Path; from fusiontree.run import lease; lease.take(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    return folder


def test_the_folder_alone_gives_step_figures_and_checkpoint(run):
    found = status(run)
    assert (found["state"], found["step"], found["steps"]) == ("ended before its last step", 500, 1000)
    assert found["last"] == {
        "tokens": 5, "loss": 3.25, "lr": 1e-3, "grad_norm": 1.0, "gate_mean": 0.5, "tokens_per_s": 100.0,
    }  # fmt: skip
    assert found["val_loss"] == 3.5
    assert found["checkpoint"]["step"] == 480
    assert found["job"] is None
    assert found["incidents"] == {"count": 0, "newest": []}


def test_a_run_whose_process_is_alive_is_running(run):
    lease.take(run)
    assert status(run)["state"] == f"running on {os.uname().nodename} (pid {os.getpid()})"


def test_a_run_on_another_host_is_running_while_its_metrics_are_fresh(run):
    (run / LEASE_FILE).write_text(json.dumps({"holder": "x", "host": "node7", "pid": 1, "time": 0, "job": None}))
    assert status(run)["state"] == "running on node7, judging by its files"
    old = time.time() - 3600
    os.utime(run / "metrics.jsonl", (old, old))
    assert status(run)["state"] == "ended before its last step"


def test_a_run_that_was_asked_to_stop_is_stopped_and_a_complete_one_finished(run):
    incidents.record(run, "rollback", 300, "loss was NaN: back to step 280")
    incidents.record(run, "signal", 500, "stopped by SIGUSR1, saved before")
    found = status(run)
    assert found["state"] == "stopped, saved"
    assert found["incidents"]["count"] == 2
    assert found["incidents"]["newest"][0].endswith("step 300 rollback: loss was NaN: back to step 280")
    (run / "checkpoints" / "step-1000").mkdir()
    (run / "checkpoints" / "latest").write_text("step-1000\n")
    assert status(run)["state"] == "finished"


def test_a_run_that_was_only_submitted_has_not_started(run):
    for name in ("lease.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    found = status(run)
    assert (found["state"], found["step"], found["last"], found["checkpoint"]) == ("not started", 0, None, None)


def test_the_queue_is_queried_if_there_is_one(run, monkeypatch):
    (run / "attempts.json").write_text(
        json.dumps({"job": "17", "start": 2, "nodes": ["n1"], "failed_attempts": 0, "step": 0})
    )
    assert status(run)["job"] == {"job": "17", "start": 2, "nodes": ["n1"], "failed_attempts": 0}
    commands = run.parent / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(SCONTROL)
    (commands / "scontrol").chmod(0o755)
    monkeypatch.setenv("STATE", "PENDING")
    found = status(run)
    assert found["state"] == "pending"
    assert found["job"] | {"start": 2} == {
        "job": "17", "start": 2, "nodes": ["n1"], "failed_attempts": 0, "state": "PENDING", "reason": "Priority",
        "run_time": "00:01:02", "time_limit": "04:00:00",
    }  # fmt: skip
    monkeypatch.setenv("STATE", "FAILED")
    assert status(run)["state"] == "ended before its last step"


def test_the_command_prints_lines_or_json(run, capsys):
    assert cli.main(["status", str(run)]) == 0
    assert "state           ended before its last step\n" in capsys.readouterr().out
    assert cli.main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 500


def test_a_missing_run_is_a_user_error(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fusiontree: error: no run at {tmp_path}; give a run's folder, e.g. runs/NAME\n"


DAMAGE = {
    "attempts.json": [b"", b"{", b'{"job": "17", "sta', b"[]", b'{"job": "--x", "start": 0}', b"\xff\xfe", None],
    "job.id": [b"", b"\n\n", b"--all", b"\xff", None],
    "lease.json": [b"", b"{}", b'{"holder": 1, "host": "x", "pid": 0, "time": NaN}', None],
    "checkpoints/latest": [b"", b"\n", b"step-", b"step-1000", b"../step-480", b"step-\xb2", b"\0" * 9, None],
    "incidents.jsonl": [b"{}\n", b'{"time": 1e300, "kind": "a", "step": 1, "message": "m"}\n', b"\xff\n", None],
    "metrics.jsonl": [b"7\n", b'{"loss": 1.0}\n', b'{"step": NaN}\n', b'{"step": 1, "loss": "x"}\n', None],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, kinds in DAMAGE.items() for content in kinds])
def test_a_damaged_file_is_named_and_the_rest_is_reported(name, content, run, capsys):
    """`content` None: a folder in place of the file."""
    path = run / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    found = status(run)
    assert str(path) in capsys.readouterr().err
    assert (found["steps"], found["checkpoint"]["step"], found["job"]) == (1000, 480, None)
    assert found["incidents"] == {"count": 0, "newest": []}
    assert found["step"] == (0 if name == "metrics.jsonl" else 500)
    unknown = "running on an unknown host, judging by its files"
    assert found["state"] == (unknown if name == "lease.json" else "ended before its last step")


def test_damaged_lines_are_counted_and_the_first_is_located(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"{\n" + lines[1] + b'{"loss": 1}\n{"step": 501, "lo')
    assert status(run)["step"] == 500
    assert capsys.readouterr().err == f"{run}/metrics.jsonl: 2 damaged lines are skipped (line 2: it is not JSON)\n"
