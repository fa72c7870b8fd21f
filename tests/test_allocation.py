"""Attempts of a SLURM job: selection of nodes and rendezvous, requeueing, the first failure."""

import base64
import json
import os
import shlex
import signal
import socket
import subprocess

import pytest

from fusiontree.config import load_config, to_yaml
from fusiontree.distributed import outcome
from fusiontree.distributed.ports import free_port
from fusiontree.errors import LOST_PEER, RunError, UserError
from launcher import allocation

# replacement for SLURM's command: expands a node list, prints a job's state, records requests to requeue
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo "$3" | tr , '\\n' ;;
"show job") echo "JobId=$4 JobState=$STATE" ;;
*) echo "$@" >> "$ASKED" ;;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a run's folder in an allocation of two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(SCONTROL)
    (commands / "scontrol").chmod(0o755)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config("tiny", ["batch.tokens=24576"])))  # 12 rows of 2048
    variables = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n1,n2", "STATE": "RUNNING"}
    for name, value in {**variables, "ASKED": tmp_path / "asked", "PATH": f"{commands}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(allocation.time, "sleep", lambda seconds: None)
    return folder


@pytest.fixture
def begin(run, monkeypatch):
    """Return a function that begins an attempt on up to two nodes and exports its variables."""

    def begin_attempt() -> dict[str, str]:
        variables = allocation.begin(run, 1, 1, 2, 60)
        monkeypatch.setenv("FUSIONTREE_LAUNCH", variables["FUSIONTREE_LAUNCH"])
        return variables

    return begin_attempt


def record(run) -> dict:
    """Return the contents of attempts.json."""
    return json.loads((run / "attempts.json").read_text())


def save(run, step: int) -> None:
    (run / "checkpoints" / f"step-{step}").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step}\n")


def requeued(run) -> list[str]:
    path = run.parent / "asked"
    return path.read_text().splitlines() if path.exists() else []


def report(run, monkeypatch, rank: int, code: int, message: str | None, start: int = 0) -> None:
    """Write a rank's exit report with the code that ranks use."""
    monkeypatch.setenv("FUSIONTREE_LAUNCH", str(run / "logs" / f"12345-{start}"))
    monkeypatch.setenv("RANK", str(rank))
    assert outcome.report(code, message)


# --- begin -----------------------------------------------------------------------------------------------------------


def test_the_script_gets_nodes_rendezvous_and_logs(run, capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert allocation.main(["begin", str(run), "--ranks-per-node", "2", "--nodes", "2-2", "--save-ahead", "60"]) == 0
    printed = capsys.readouterr()
    script = f'{printed.out}\nprintf \'%s \' "$nodes" "$logs"; env -0'
    seen = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True).stdout
    nodes, logs, rest = seen.split(" ", 2)
    variables = dict(entry.split("=", 1) for entry in rest.split("\0") if "=" in entry)
    assert (nodes, logs) == ("2", str(run / "logs" / "12345-0"))
    assert (variables["MASTER_ADDR"], variables["FUSIONTREE_LAUNCH"]) == ("n1", logs)
    assert 20_000 + 12345 % 10_000 <= int(variables["MASTER_PORT"]) < 32_768
    assert "NCCL_DEBUG=INFO" in printed.err
    assert "attempt 0 from step 0 on n1 n2, rendezvous at n1:" in printed.err


def test_the_world_info_lists_the_devices_of_every_node(run):
    variables = allocation.begin(run, 2, 2, 2, 60)
    assert json.loads(base64.urlsafe_b64decode(variables["WORLD_INFO"])) == {"n1": [0, 1], "n2": [0, 1]}


def test_saves_that_take_longer_than_reserved_are_logged(run, begin, capsys):
    config = load_config(str(run / "config.yaml")).model_copy(update={"output": run.parent, "name": run.name})
    (run / "config.yaml").write_text(to_yaml(config))
    save(run, 4)
    begin()
    assert "--save-ahead" not in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 4, "tokens_per_s": 24576, "save_seconds": 100}\n')
    begin()
    assert "submit the next job with --save-ahead 260" in capsys.readouterr().err


def test_two_jobs_on_one_node_use_different_ports():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert free_port(port) > port


@pytest.mark.parametrize(
    ("allocated", "min_nodes", "expected"), [(2, 2, 2), (4, 1, 4), (5, 1, 4), (7, 2, 6), (12, 1, 12)]
)
def test_the_largest_number_of_nodes_that_divides_the_batch_is_used(allocated, min_nodes, expected, run):
    assert allocation.fitting_nodes(load_config(str(run / "config.yaml")), allocated, 1, min_nodes) == expected


def test_an_allocation_that_cannot_divide_the_batch_is_an_error(run, capsys):
    code = allocation.main(["begin", str(run), "--ranks-per-node", "5", "--nodes", "1-2", "--save-ahead", "60"])
    assert code == 2
    assert "does not divide among 5 ranks" in capsys.readouterr().err


def test_using_fewer_nodes_is_logged(run, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2,n3,n4,n5")
    variables = allocation.begin(run, 1, 2, 6, 60)
    assert variables["nodes"] == "4"
    assert "using 4 of 6 nodes (at least 2, 5 allocated)" in capsys.readouterr().err


def test_a_job_is_refused_after_too_many_attempts_without_a_checkpoint(run):
    for start in range(allocation.MAX_ATTEMPTS):
        assert allocation.begin(run, 1, 1, 2, 60)["logs"].endswith(f"12345-{start}")
    with pytest.raises(RunError, match="job 12345 has begun 5 attempts from step 0 without a new checkpoint"):
        allocation.begin(run, 1, 1, 2, 60)
    save(run, 4)
    allocation.begin(run, 1, 1, 2, 60)
    assert record(run)["failed_attempts"] == 0


def test_a_new_job_starts_to_count_from_zero(run, monkeypatch):
    for _ in range(allocation.MAX_ATTEMPTS):
        allocation.begin(run, 1, 1, 2, 60)
    monkeypatch.setenv("SLURM_JOB_ID", "12346")
    allocation.begin(run, 1, 1, 2, 60)
    assert record(run) | {"time": 0} == {
        "job": "12346", "start": 0, "step": 0, "failed_attempts": 0, "nodes": ["n1", "n2"], "time": 0,
    }  # fmt: skip


# --- end -------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_requeued(run, begin):
    begin()
    assert allocation.end(run, 0) == 0
    assert requeued(run) == []


def test_a_stopped_run_is_requeued_as_long_as_it_saves(run, begin, monkeypatch, capsys):
    for start in range(4):
        begin()
        save(run, 10 * (start + 1))
        report(run, monkeypatch, 0, 75, "stopped by SIGUSR1 at step 10, saved", start)
        assert allocation.end(run, 75) == 75
    assert requeued(run) == ["requeue 12345"] * 4
    assert "stopped by SIGUSR1 at step 10, saved" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_stopped_before_its_ranks_start_is_requeued(number, run, begin, capsys):
    save(run, 10)
    begin()
    (run / "logs" / "12345-0" / "rank-0.out").touch()  # srun's; the rank has not reported its start
    assert allocation.end(run, 128 + number) == 75
    assert requeued(run) == ["requeue 12345"]
    assert f"stopped by {number.name} before any rank started" in capsys.readouterr().err


def test_a_stale_attempt_leaves_the_newer_one_alone(run, begin, monkeypatch, capsys):
    old = begin()
    begin()
    save(run, 8)
    before = record(run)
    monkeypatch.setenv("FUSIONTREE_LAUNCH", old["FUSIONTREE_LAUNCH"])
    assert allocation.end(run, 76) == 76
    assert requeued(run) == []
    assert record(run) == before
    assert "a newer attempt of the run has taken over (12345-1)" in capsys.readouterr().err


def test_a_user_error_is_not_requeued(run, begin, monkeypatch, capsys):
    begin()
    save(run, 10)
    report(run, monkeypatch, 1, 2, "data.path nowhere: no manifest.json there")
    assert allocation.end(run, 137) == 2  # srun returns the code of a rank that it killed afterwards
    assert requeued(run) == []
    assert f"rank 1 on {os.uname().nodename}: data.path nowhere" in capsys.readouterr().err


def test_two_failures_without_a_checkpoint_end_the_job(run, begin, capsys):
    begin()
    assert allocation.end(run, 1) == 1
    assert requeued(run) == ["requeue 12345"]
    begin()
    assert allocation.end(run, 1) == 1
    assert requeued(run) == ["requeue 12345"]
    assert "not requeued: 2 attempts from step 0 without a new checkpoint" in capsys.readouterr().err


def test_a_checkpoint_between_failures_keeps_the_job_requeued(run, begin):
    for step in (0, 4, 8):
        save(run, step)
        begin()
        save(run, step + 2)
        allocation.end(run, 1)
    assert len(requeued(run)) == 3


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "COMPLETING", "NODE_FAIL"])
def test_a_job_that_slurm_is_ending_is_not_requeued(state, run, begin, monkeypatch):
    begin()
    save(run, 3)
    monkeypatch.setenv("STATE", state)
    assert allocation.end(run, 75) == 75
    assert requeued(run) == []


# --- damaged records ---


@pytest.mark.parametrize("content", ["", '{"job": "12345", "sta', "[]", '{"job": 12345}'])
def test_a_damaged_record_of_attempts_is_named_and_counted_anew(content, run, begin, capsys):
    begin()
    save(run, 4)
    (run / "attempts.json").write_text(content)
    assert begin()["logs"].endswith("12345-1")  # not the logs of the attempt before
    assert f"{run}/attempts.json is damaged" in capsys.readouterr().err
    assert record(run)["step"] == 4
    (run / "attempts.json").write_text(content)
    assert allocation.end(run, 1) == 1
    assert requeued(run) == ["requeue 12345"]
    assert record(run)["start"] == 1


def test_a_stale_attempt_is_recognized_by_the_logs_alone(run, begin, monkeypatch, capsys):
    old = begin()
    begin()
    monkeypatch.setenv("FUSIONTREE_LAUNCH", old["FUSIONTREE_LAUNCH"])
    (run / "attempts.json").write_text("")
    assert allocation.end(run, 76) == 76
    assert requeued(run) == []
    assert "a newer attempt of the run has taken over (12345-1)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "garbage", "step-9\n"])
def test_a_damaged_pointer_to_the_newest_checkpoint_is_named(content, run, capsys):
    save(run, 4)
    (run / "checkpoints" / "latest").write_text(content)
    assert allocation.main(["begin", str(run), "--ranks-per-node", "1", "--nodes", "1-2", "--save-ahead", "60"]) == 0
    errors = capsys.readouterr().err
    assert f"{run}/checkpoints/latest is damaged (" in errors
    assert "the newest checkpoint is step-4" in errors
    assert "attempt 0 from step 4" in errors


def test_a_damaged_exit_report_counts_as_none(run, begin, monkeypatch, capsys):
    begin()
    logs = run / "logs" / "12345-0"
    for name in ("rank-0.json", "rank-0.started", "rank-x.started"):
        (logs / name).write_text("{")
    (logs / "rank-1.started").write_text("n2 77")
    report(run, monkeypatch, 2, 1, LOST_PEER)
    assert allocation.end(run, 1) == 1
    assert "rank 0 ended without an exit report" in capsys.readouterr().err


# --- the first failure -----------------------------------------------------------------------------------------------


def test_the_earliest_cause_is_shown_and_not_its_consequences(run, begin, monkeypatch, capsys):
    begin()
    report(run, monkeypatch, 0, 1, LOST_PEER)
    report(run, monkeypatch, 3, 1, "checkpoint could not be written: disk full")
    report(run, monkeypatch, 2, 1, "something later")
    assert allocation.end(run, 1) == 1
    assert f"rank 3 on {os.uname().nodename}: checkpoint could not be written: disk full" in capsys.readouterr().err


def test_a_killed_rank_is_named_with_the_last_lines_of_its_output(run, begin, monkeypatch, capsys):
    logs = run / "logs" / "12345-0"
    begin()
    (logs / "rank-0.out").write_text("step 1\n")
    (logs / "rank-1.out").write_text("\n".join(f"line {n}" for n in range(30)))
    (logs / "rank-1.started").write_text("n2 77")
    report(run, monkeypatch, 0, 1, LOST_PEER)
    allocation.end(run, 137)
    errors = capsys.readouterr().err
    assert "rank 1 on n2 ended without an exit report; the last lines of its output:\n  line 15\n" in errors
    assert "line 14" not in errors
    assert "line 29" in errors


def test_a_traceback_is_shown_from_the_ranks_output(run, begin, monkeypatch, capsys):
    begin()
    (run / "logs" / "12345-0" / "rank-1.out").write_text("Traceback\nZeroDivisionError: division by zero\n")
    report(run, monkeypatch, 1, 1, None)
    allocation.end(run, 1)
    errors = capsys.readouterr().err
    assert (
        f"rank 1 on {os.uname().nodename}: failed; the last lines of its output:\n  Traceback\n  ZeroDivisionError"
        in errors
    )


def test_paths_with_blanks_are_quoted_for_the_script(run, monkeypatch, capsys):
    odd = run.parent / "a b"
    run.rename(odd)
    allocation.main(["begin", str(odd), "--ranks-per-node", "1", "--nodes", "1-2", "--save-ahead", "60"])
    lines = capsys.readouterr().out.splitlines()
    assert f"logs={shlex.quote(str(odd / 'logs' / '12345-0'))}" in lines
    with pytest.raises(UserError):
        load_config(str(run / "config.yaml"))
