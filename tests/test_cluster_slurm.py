"""Jobs on a real SLURM cluster of two nodes: complete, stopped, killed, partitioned, requeued."""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import NODES, PATH, Cluster, full_disk, image, ranks, steps, training, until, why_not
from conftest import LONG, cli, metrics, settings

pytestmark = pytest.mark.cluster
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


SHORT = {"schedule__steps": 8}


def words(shards: Path, run: Path, *options: object, **changes: object) -> list[object]:
    """Return the command that submits a run."""
    target = ["--slurm", "--nodes", 2, "--ranks-per-node", 1, "--time", 10, *options]
    return [
        *(sys.executable, "-m", "fusiontree", "launch", "tiny"),
        *settings(shards, run.parent, name=run.name, **changes),
        *target,
    ]


def launch(cluster: Cluster, *arguments: Any, code: int = 0, **changes: Any):
    """Submit a run from the cluster's head node."""
    return cluster.run(*words(*arguments, **changes), code=code, timeout=240)


def submitted(*arguments, **keywords) -> str:
    """Submit a run and return the job's id."""
    return re.match(r"job (\d+):", launch(*arguments, **keywords).stdout)[1]


def log(run: Path, job: str) -> str:
    """Return the log of the job's script."""
    return (run / "logs" / f"slurm-{job}.log").read_text()


def ended(cluster: Cluster, job: str, seconds: float = 180) -> dict[str, str]:
    """Wait until the job has ended and return SLURM's record of it."""
    until(lambda: cluster.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds, f"job {job}")
    return cluster.state(job)


def check_resumed(cluster: Cluster, job: str, run: Path, truth: Path, signal: str, times: int = 1) -> None:
    """Check that a job ended with the metrics of `truth` after `times` requeues, each after a save on `signal`."""
    assert ended(cluster, job)["JobState"] == "COMPLETED"
    assert f"stopped by {signal}" in log(run, job)
    assert cluster.state(job)["Restarts"] == str(times)
    assert metrics(run) == metrics(truth)


def status(cluster: Cluster, run: Path) -> dict[str, Any]:
    """Return the output of ``fusiontree status`` on the cluster's head node."""
    return json.loads(cluster.run(sys.executable, "-m", "fusiontree", "status", run, "--json").stdout)


def modification_times(run: Path) -> dict[Path, int]:
    """Return the modification time of each file of the run, except logs."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if "logs" not in path.parts}


@pytest.fixture(scope="module")
def short_truth(shards, tmp_path_factory) -> Path:
    """Return a `SHORT` run on two ranks of this machine."""
    output = tmp_path_factory.mktemp("truth")
    cli("launch", "tiny", "--local", "2", *settings(shards, output, name="truth", **SHORT))
    return output / "truth"


# --- complete jobs ---------------------------------------------------------------------------------------------------


def test_paths_and_variables_are_not_interpreted_on_the_way(calm, shards, tmp_path, monkeypatch):
    here, run = tmp_path / "a 'b' $(touch executed) #", tmp_path / "c \"d\" $(touch executed) 'e' exp[12]" / "run"
    here.mkdir()
    monkeypatch.chdir(here)
    greeting = "GREETING=$(touch executed)\n `touch executed` 'x"
    command = words(shards, run, "--env", greeting, "--sbatch", "comment='a # b'", schedule__steps=3)
    done = calm.run(*command, "--wait", PYTHONPATH=str(Path(__file__).parents[1]), timeout=240)
    job = re.match(r"job (\d+):", done.stdout)[1]
    assert metrics(run)
    assert (run / "logs" / f"slurm-{job}.log").exists()
    assert (run / "logs" / f"{job}-0" / "rank-1.out").exists()
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("tasks", ["rank", "node"])
def test_two_nodes_train_like_one_machine(tasks, calm, shards, tmp_path, short_truth):
    run = tmp_path / "run"
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/sh\ntouch {tmp_path}/ssh-was-called; exec false\n")
    ssh.chmod(0o755)
    path = f"PATH={ssh.parent}:{PATH}"
    done = launch(calm, shards, run, "--wait", "--tasks", tasks, "--env", path, **SHORT)
    assert not (tmp_path / "ssh-was-called").exists()
    assert metrics(run) == metrics(short_truth)
    job = re.match(r"job (\d+): .*/job.sbatch\nfollow it with  tail -F .*\ncancel it with  scancel \1\n", done.stdout)[
        1
    ]
    assert "validation loss" in done.stdout  # --wait copies the log
    logs = run / "logs"
    assert {path.name for path in (logs / f"{job}-0").glob("*.out")} == {f"{tasks}-0.out", f"{tasks}-1.out"}
    assert {path.name for path in logs.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    hosts = {(logs / f"{job}-0" / f"rank-{rank}.started").read_text().split()[0] for rank in (0, 1)}
    assert hosts == set(NODES)
    assert calm.state(job)["JobState"] == "COMPLETED"


def test_setup_lines_variables_and_extra_directives_reach_the_ranks(calm, shards, tmp_path):
    run = tmp_path / "run"
    program = "import os; print(os.environ['GREETING'], os.environ['LISTED'], os.environ['MADE'])"
    (tmp_path / "variables").write_text("# comment\nGREETING=overridden\nLISTED='c d'\n")
    options = ["--pre-command", "export MADE=by-setup", "--env", "GREETING=a b", "--env-file", tmp_path / "variables"]
    options += ["--sbatch=--comment=extra", "--sbatch=--hold"]
    dry = launch(calm, shards, run, *options, "--dry-run", **SHORT).stdout
    assert not run.exists()
    job = submitted(calm, shards, run, *options, **SHORT)
    assert calm.state(job)["Comment"] == "extra"
    script = (run / "job.sbatch").read_text()
    assert script == dry
    probe = run / "probe.sbatch"  # the same script with another program
    probe.write_text(re.sub(r"-m fusiontree train .*", f'-c "{program}"', script).replace("#SBATCH --hold\n", ""))
    done = calm.run("sbatch", "--wait", "--parsable", probe)
    number = done.stdout.strip()
    assert (run / "logs" / f"{number}-0" / "rank-1.out").read_text() == "a b c d by-setup\n"


def inside(runtime: str, folder: Path) -> list[object]:
    """Return the options that run the ranks in a container with a root of its own."""
    bundle = image(folder)
    if runtime == "crun":
        return ["--container", f"oci:{bundle}", "--env", f"PATH=/image/bin:{PATH}"]
    mounts = ",".join(f"{path}:{path}" for path in ("/usr", "/bin", "/lib", "/lib64", sys.base_prefix))
    container = ["--container", bundle / "rootfs", "--container-mounts", mounts]
    return [*container, "--env", "APPTAINERENV_PREPEND_PATH=/image/bin"]


@pytest.mark.parametrize("runtime", ["crun", "apptainer"])
def test_ranks_in_containers_save_and_resume_exactly(runtime, calm, shards, tmp_path, truth):
    if shutil.which(runtime, path=PATH) is None:
        pytest.skip(f"no {runtime} here")
    run = tmp_path / "run"
    container = inside(runtime, tmp_path / "image")
    job = submitted(calm, shards, run, *container, **LONG)
    training(run, 8)
    started = [path.read_text().split() for path in (run / "logs" / f"{job}-0").glob("rank-*.started")]
    assert [calm.run("ls", f"/proc/{pid}/root/image/bin", on=node).stdout for node, pid in started] == ["python\n"] * 2
    calm.run("scancel", "--signal=USR1", job)
    check_resumed(calm, job, run, truth, "SIGUSR1")


def test_a_task_of_a_sweep_is_requeued_alone(calm, shards, tmp_path):
    run = tmp_path / "run"
    axis = ["--nodes", 1, "--sweep", "optimizer.lr=1e-3,3e-4"]
    launched = calm.start(*words(shards, run, *axis, "--wait", **LONG))
    until((run / "job.id").exists, 60)
    job = (run / "job.id").read_text().strip()
    first, last = (tmp_path / f"run-lr{rate}" for rate in ("1e-3", "3e-4"))
    for one in (first, last):
        training(one, 8)
    calm.run("scancel", "--signal=USR1", f"{job}_1")  # the last task shares its id with the array
    output = launched.communicate(timeout=180)[0]
    assert launched.returncode == 0, output
    assert "requeued: the next attempt resumes from step" in output
    rendezvous = set(re.findall(r"rendezvous at (\S+);", output))
    assert len(rendezvous) == 3, output  # two tasks at once, perhaps on one node, and the second attempt of one
    states = [calm.state(f"{job}_{task}") for task in (0, 1)]
    assert [(state["JobState"], state["Restarts"]) for state in states] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    for one in (first, last):
        assert steps(one) == [*range(1, LONG["schedule__steps"] + 1)]
    assert metrics(first)[0]["lr"] == pytest.approx(metrics(last)[0]["lr"] * 10 / 3)


def test_the_doctor_probes_the_nodes_of_an_allocation(calm, shards, tmp_path):
    words = settings(shards, tmp_path / "out")
    doctor = [sys.executable, "-m", "fusiontree", "doctor", "tiny", "--json", "--nodes", 2, *words]
    report = json.loads(calm.run("salloc", "--nodes=2", "--quiet", *doctor).stdout)
    assert set(report["cluster"]["hosts"]) == set(NODES)
    assert report["cluster"]["hosts"]["node2"].endswith("12 (eth0)")
    assert all(rate["bus_gb_per_s"] > 0 for rate in report["cluster"]["all_reduce"].values())
    assert report["problems"] == []
    assert not (tmp_path / "out").exists()


# --- stopped and requeued --------------------------------------------------------------------------------------------


def test_a_job_that_is_asked_to_save_is_requeued_and_resumes_exactly(calm, shards, tmp_path, truth):
    """SIGUSR1 to the job's steps, as SLURM sends it before the time limit."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, logging__wandb="true", **LONG)
    for step in (8, 20):
        training(run, step)
        found = status(calm, run)
        assert (found["state"], found["job"]["job"], found["job"]["nodes"]) == ("running", job, list(NODES))
        calm.run("scancel", "--signal=USR1", job)
        until(lambda: calm.state(job)["JobState"] != "RUNNING", 60)
    check_resumed(calm, job, run, truth, "SIGUSR1", times=2)
    attempts = [path.name.rpartition("-") for path in (run / "wandb").glob("offline-run-*")]
    assert (len(attempts), len({run_id for _, _, run_id in attempts})) == (3, 1)
    found = status(calm, run)
    assert (found["state"], found["step"], found["checkpoint"]["step"], found["job"]["start"]) == (
        "finished",
        60,
        60,
        2,
    )
    assert found["incidents"]["count"] == 4  # stopped twice, resumed twice


def test_a_preempted_job_saves_and_resumes_exactly(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 12)
    urgent = calm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    assert ended(calm, urgent.stdout.strip())["JobState"] == "COMPLETED"
    check_resumed(calm, job, run, truth, "SIGTERM")


def test_a_job_is_requeued_at_its_time_limit(calm, shards, tmp_path):
    run = tmp_path / "run"
    job = submitted(
        calm, shards, run, "--time", 1, "--save-ahead", 1, **LONG | {"schedule__steps": 2000, "checkpoint__every": 2000}
    )
    until(lambda: calm.state(job)["Restarts"] == "1", 120, "the requeue")
    before = max(steps(run))
    assert "requeued: the next attempt resumes from step" in log(run, job)
    training(run, before + 2)
    written = steps(run)  # read once: the run may still be writing
    assert written == sorted(set(written))
    assert before > 0


def test_a_cancelled_job_ends_at_once_and_is_not_requeued(calm, shards, tmp_path):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 2)
    calm.run("scancel", job)
    assert ended(calm, job, 30)["JobState"] == "CANCELLED"
    time.sleep(8)  # longer than SLURM delays a requeued job
    assert calm.state(job)["JobState"] == "CANCELLED"
    assert not ranks(calm, run)


def test_a_killed_rank_is_named_and_the_job_resumes_exactly(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 12)
    calm.run("kill", "-9", *[pid for node, pid in ranks(calm, run) if node == "node2"][-1:], on="node2")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert metrics(run) == metrics(truth)
    assert "rank 1 on node2 ended without an exit report" in log(run, job)


def test_a_full_disk_on_one_node_fails_checkpoints_but_not_the_run(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 7)
    with full_disk(calm, "node2", run / "checkpoints"):
        until(lambda: (run / "incidents.jsonl").exists(), 60, "a checkpoint that could not be written")
    assert "No space left on device" in (run / "incidents.jsonl").read_text()
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert metrics(run) == metrics(truth)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{LONG['schedule__steps']}\n"


def test_a_job_that_keeps_failing_is_not_requeued_again(calm, shards, tmp_path):
    """The ranks cannot write their first checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / "checkpoints").write_text("not a folder")
    done = launch(calm, shards, run, "--wait", code=1, **SHORT)
    assert "requeued: the next attempt resumes from step 0" in done.stdout
    assert "not requeued: 2 attempts from step 0 without a new checkpoint" in done.stdout


def test_a_user_error_ends_the_job_with_its_code(calm, shards, tmp_path):
    run = tmp_path / "run"
    launch(calm, shards, run, "--wait", schedule__steps=1, schedule__warmup_steps=0)
    (run / "config.yaml").unlink()
    job = calm.run("sbatch", "--parsable", run / "job.sbatch").stdout.strip()
    record = ended(calm, job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "2:0")
    assert "is neither a file nor a preset" in log(run, job)


# --- lost and stale nodes --------------------------------------------------------------------------------------------


def test_a_job_that_lost_a_node_resumes_on_fewer(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--min-nodes", 1, **LONG)
    training(run, 12)
    calm.crash("node2")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert "using 1 of 2 nodes (at least 1)" in log(run, job)
    assert json.loads((run / "attempts.json").read_text())["nodes"] == ["node1"]
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(truth)]
    for here, there in zip(metrics(run), metrics(truth), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)


def test_a_stale_attempt_leaves_the_run_to_the_next_one(calm, shards, tmp_path):
    """After a network partition, the node with rank 0 and the job's script keeps running on the same files."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--min-nodes", 1, **LONG)
    training(run, 12)
    calm.cut("node1")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert json.loads((run / "attempts.json").read_text())["nodes"] == ["node2"]
    assert json.loads((run / "lease.json").read_text())["host"] == "node2"
    assert steps(run) == [*range(1, LONG["schedule__steps"] + 1)]
    before = modification_times(run)
    until(lambda: not ranks(calm, run), 120, "the end of the stale attempt")
    calm.settle()  # reconnects the node
    time.sleep(2)
    assert modification_times(run) == before
    assert calm.state(job)["JobState"] == "COMPLETED"


def test_a_stale_attempt_after_a_partition_ends_itself(calm, shards, tmp_path):
    """The stale ranks need no other node: they train until they check the lease."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--nodes", 1, **LONG | {"schedule__steps": 100_000, "checkpoint__every": 20})
    training(run, 25)
    (node,) = {node for node, _ in ranks(calm, run)}
    calm.cut(node)
    until(lambda: json.loads((run / "lease.json").read_text())["host"] != node, 120, "the next attempt")
    until(lambda: node not in {where for where, _ in ranks(calm, run)}, 30, "the end of the stale attempt")
    before = max(steps(run), default=0)
    training(run, before + 20)
    assert steps(run) == [*range(1, len(steps(run)) + 1)]
    assert "is now written by a newer attempt" in (run / "logs" / f"{job}-0" / "rank-0.json").read_text()
    assert calm.state(job)["JobState"] == "RUNNING"


# --- refused before submission ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "gpu"], "--partition gpu does not exist; choose from debug, urgent"),
        (["--nodes", 3], "SLURM rejects .*: Requested node configuration is not available"),
        (["--constraint", "ib"], "SLURM rejects .*: .*feature"),
        (["--sbatch=--nonsense"], "SLURM rejects .*"),
        (["--save-ahead", 700], "--time 10 is 600 s, and the ranks are asked to save 700 s before its end"),
    ],
)
def test_a_job_that_slurm_could_never_run_is_refused_in_one_line(options, message, calm, shards, tmp_path):
    failed = launch(calm, shards, tmp_path / "run", *options, code=2, batch__tokens=6144)
    assert re.match(f"fusiontree: error: {message}", failed.stderr)
    assert failed.stderr.count("\n") == 1
    assert calm.run("squeue", "--noheader").stdout == ""


def test_the_partitions_time_limit_applies_without_one(calm, shards, tmp_path):
    run = tmp_path / "run"
    command = [word for word in words(shards, run, "--save-ahead", 700) if word not in ("--time", 10)]
    failed = calm.run(*command, code=2)
    assert "the partition's time limit 10:00 is 600 s, and the ranks are asked to save 700 s before" in failed.stderr
    assert calm.run(*command, "--partition", "urgent", code=2).stderr == failed.stderr
    assert not run.exists()
