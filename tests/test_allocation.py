"""Inside an allocation: which nodes take part, where they meet, what becomes of a job when a start has ended."""

import base64
import json
import os
import shlex
import socket
import subprocess

import pytest

from fusiontree.config import load_config, to_yaml
from fusiontree.distributed import outcome
from fusiontree.distributed.ports import free_port
from fusiontree.errors import LOST_PEER, RunError, UserError
from launcher import allocation

# stands in for SLURM's command: lists hosts, tells a state, notes what it was asked to requeue
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo "$3" | tr , '\\n' ;;
"show job") echo "JobId=$4 JobState=$STATE" ;;
*) echo "$@" >> "$ASKED" ;;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder in an allocation of two nodes."""
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
    """Begins a start on up to two nodes and gives the rest of the script what it said."""

    def start() -> dict[str, str]:
        facts = allocation.begin(run, 1, 1, 2, 60)
        monkeypatch.setenv("FUSIONTREE_LAUNCH", facts["FUSIONTREE_LAUNCH"])
        return facts

    return start


def save(run, step: int) -> None:
    (run / "checkpoints" / "latest").write_text(f"step-{step}\n")


def requeued(run) -> list[str]:
    path = run.parent / "asked"
    return path.read_text().splitlines() if path.exists() else []


def report(run, monkeypatch, rank: int, code: int, message: str | None, start: int = 0) -> None:
    """What a rank leaves behind, by its own code."""
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
    assert "start 0 from step 0 on n1 n2" in printed.err


def test_deepspeeds_node_launcher_reads_the_nodes_as_meant(run):
    facts = allocation.begin(run, 2, 2, 2, 60)
    assert json.loads(base64.urlsafe_b64decode(facts["WORLD_INFO"])) == {"n1": [0, 1], "n2": [0, 1]}


def test_saves_that_take_longer_than_they_are_given_are_told(run, begin, capsys):
    config = load_config(str(run / "config.yaml")).model_copy(update={"output": run.parent, "name": run.name})
    (run / "config.yaml").write_text(to_yaml(config))
    save(run, 4)
    begin()
    assert "--save-ahead" not in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 4, "tokens_per_s": 24576, "save_seconds": 100}\n')
    begin()
    assert "submit the next job with --save-ahead 260" in capsys.readouterr().err


def test_two_jobs_on_one_node_meet_at_different_ports():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert free_port(port) > port


@pytest.mark.parametrize(("given", "least", "expected"), [(2, 2, 2), (4, 1, 4), (5, 1, 4), (7, 2, 6), (12, 1, 12)])
def test_the_largest_number_of_nodes_among_which_the_batch_divides_takes_part(given, least, expected, run):
    assert allocation.fitting_nodes(load_config(str(run / "config.yaml")), given, 1, least) == expected


def test_no_fitting_number_of_nodes_is_an_error_that_says_which_would_fit(run, capsys):
    code = allocation.main(["begin", str(run), "--ranks-per-node", "5", "--nodes", "1-2", "--save-ahead", "60"])
    assert code == 2
    assert "does not divide among 5 ranks" in capsys.readouterr().err


def test_fewer_nodes_than_asked_for_are_said(run, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2,n3,n4,n5")
    facts = allocation.begin(run, 1, 2, 6, 60)
    assert facts["nodes"] == "4"
    assert "on 4 of 6 nodes (2 at least, 5 given)" in capsys.readouterr().err


def test_a_job_that_only_ever_starts_is_not_begun_for_ever(run):
    for start in range(allocation.STARTS):
        assert allocation.begin(run, 1, 1, 2, 60)["logs"].endswith(f"12345-{start}")
    with pytest.raises(RunError, match="job 12345 has started 5 times from step 0 without getting further"):
        allocation.begin(run, 1, 1, 2, 60)
    save(run, 4)
    allocation.begin(run, 1, 1, 2, 60)
    assert allocation.read_attempts(run)["failed_attempts"] == 0


def test_a_job_submitted_anew_counts_anew(run, monkeypatch):
    for _ in range(allocation.STARTS):
        allocation.begin(run, 1, 1, 2, 60)
    monkeypatch.setenv("SLURM_JOB_ID", "12346")
    allocation.begin(run, 1, 1, 2, 60)
    assert allocation.read_attempts(run) | {"time": 0} == {
        "job": "12346", "start": 0, "step": 0, "failed_attempts": 0, "nodes": ["n1", "n2"], "time": 0,
    }  # fmt: skip


# --- end -------------------------------------------------------------------------------------------------------------


def test_a_finished_run_ends_its_job(run, begin):
    begin()
    assert allocation.end(run, 0) == 0
    assert requeued(run) == []


def test_a_stopped_run_is_requeued_as_often_as_it_takes(run, begin, monkeypatch, capsys):
    for start in range(4):
        begin()
        save(run, 10 * (start + 1))
        report(run, monkeypatch, 0, 75, "stopped by SIGUSR1 at step 10, saved", start)
        assert allocation.end(run, 75) == 75
    assert requeued(run) == ["requeue 12345"] * 4
    assert "stopped by SIGUSR1 at step 10, saved" in capsys.readouterr().err


def test_a_start_that_was_cut_off_leaves_the_newer_one_alone(run, begin, monkeypatch, capsys):
    old = begin()
    begin()
    save(run, 8)
    before = allocation.read_attempts(run)
    monkeypatch.setenv("FUSIONTREE_LAUNCH", old["FUSIONTREE_LAUNCH"])
    assert allocation.end(run, 76) == 76
    assert requeued(run) == []
    assert allocation.read_attempts(run) == before
    assert "a newer start of the run has taken over (12345-1)" in capsys.readouterr().err


def test_a_users_mistake_is_not_repeated(run, begin, monkeypatch, capsys):
    begin()
    save(run, 10)
    report(run, monkeypatch, 1, 2, "data.path nowhere: no manifest.json there")
    assert allocation.end(run, 137) == 2  # srun's code is that of a rank it has killed for it
    assert requeued(run) == []
    assert f"rank 1 on {os.uname().nodename}: data.path nowhere" in capsys.readouterr().err


def test_failing_twice_without_progress_ends_the_job(run, begin, capsys):
    begin()
    assert allocation.end(run, 1) == 1
    assert requeued(run) == ["requeue 12345"]
    begin()
    assert allocation.end(run, 1) == 1
    assert requeued(run) == ["requeue 12345"]
    assert "not requeued: 2 starts from step 0 without a checkpoint beyond it" in capsys.readouterr().err


def test_progress_between_two_failures_keeps_the_job_going(run, begin):
    for step in (0, 4, 8):
        save(run, step)
        begin()
        save(run, step + 2)
        allocation.end(run, 1)
    assert len(requeued(run)) == 3


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "COMPLETING", "NODE_FAIL"])
def test_a_job_that_is_ended_from_outside_does_not_come_back(state, run, begin, monkeypatch):
    begin()
    save(run, 3)
    monkeypatch.setenv("STATE", state)
    assert allocation.end(run, 75) == 75
    assert requeued(run) == []


# --- the first error -------------------------------------------------------------------------------------------------


def test_the_first_failure_in_time_is_shown_not_what_came_of_it(run, begin, monkeypatch, capsys):
    begin()
    report(run, monkeypatch, 0, 1, LOST_PEER)
    report(run, monkeypatch, 3, 1, "checkpoint could not be written: disk full")
    report(run, monkeypatch, 2, 1, "something later")
    assert allocation.end(run, 1) == 1
    assert f"rank 3 on {os.uname().nodename}: checkpoint could not be written: disk full" in capsys.readouterr().err


def test_a_rank_that_was_killed_is_named_with_the_end_of_its_output(run, begin, monkeypatch, capsys):
    logs = run / "logs" / "12345-0"
    begin()
    (logs / "rank-0.out").write_text("step 1\n")
    (logs / "rank-1.out").write_text("\n".join(f"line {n}" for n in range(30)))
    (logs / "rank-1.started").write_text("n2 77")
    report(run, monkeypatch, 0, 1, LOST_PEER)
    allocation.end(run, 137)
    said = capsys.readouterr().err
    assert "rank 1 on n2 ended without a word, its output ends:\n  line 15\n" in said
    assert "line 14" not in said
    assert "line 29" in said


def test_a_traceback_is_shown_from_the_ranks_output(run, begin, monkeypatch, capsys):
    begin()
    (run / "logs" / "12345-0" / "rank-1.out").write_text("Traceback\nZeroDivisionError: division by zero\n")
    report(run, monkeypatch, 1, 1, None)
    allocation.end(run, 1)
    said = capsys.readouterr().err
    assert f"rank 1 on {os.uname().nodename}: failed, its output ends:\n  Traceback\n  ZeroDivisionError" in said


def test_the_words_of_the_script_stay_words(run, monkeypatch, capsys):
    odd = run.parent / "a b"
    run.rename(odd)
    allocation.main(["begin", str(odd), "--ranks-per-node", "1", "--nodes", "1-2", "--save-ahead", "60"])
    lines = capsys.readouterr().out.splitlines()
    assert f"logs={shlex.quote(str(odd / 'logs' / '12345-0'))}" in lines
    with pytest.raises(UserError):
        load_config(str(run / "config.yaml"))
