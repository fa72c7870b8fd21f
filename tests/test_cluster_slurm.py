"""Jobs on a real SLURM cluster of two nodes: run, stopped, killed, cut off, and come back."""

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
    """The command that submits a run."""
    target = ["--slurm", "--nodes", 2, "--ranks-per-node", 1, "--time", 10, *options]
    return [
        *(sys.executable, "-m", "fusiontree", "launch", "tiny"),
        *settings(shards, run.parent, name=run.name, **changes),
        *target,
    ]


def launch(cluster: Cluster, *arguments: Any, code: int = 0, **changes: Any):
    """Submit a run from the cluster's head."""
    return cluster.run(*words(*arguments, **changes), code=code, timeout=240)


def submitted(*arguments, **keywords) -> str:
    """Submit a run; the job's id."""
    return re.match(r"job (\d+):", launch(*arguments, **keywords).stdout)[1]


def log(run: Path, job: str) -> str:
    """What the job's script and srun have said."""
    return (run / "logs" / f"slurm-{job}.log").read_text()


def ended(cluster: Cluster, job: str, seconds: float = 180) -> dict[str, str]:
    """Wait until the job is over; what SLURM knows of it."""
    until(lambda: cluster.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds, f"job {job}")
    return cluster.state(job)


def came_back(cluster: Cluster, job: str, run: Path, truth: Path, signal: str, times: int = 1) -> None:
    """Hold a job to have ended as `truth` did after so many requeues, each behind a save on `signal`."""
    assert ended(cluster, job)["JobState"] == "COMPLETED"
    assert f"stopped by {signal}" in log(run, job)
    assert cluster.state(job)["Restarts"] == str(times)
    assert metrics(run) == metrics(truth)


def status(cluster: Cluster, run: Path) -> dict[str, Any]:
    """What the command says at the cluster's head."""
    return json.loads(cluster.run(sys.executable, "-m", "fusiontree", "status", run, "--json").stdout)


def contents(run: Path) -> dict[Path, int]:
    """When each file of the run was written, logs aside."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if "logs" not in path.parts}


@pytest.fixture(scope="module")
def short_truth(shards, tmp_path_factory) -> Path:
    """A `SHORT` run on two ranks of this machine."""
    output = tmp_path_factory.mktemp("truth")
    cli("launch", "tiny", "--local", "2", *settings(shards, output, name="truth", **SHORT))
    return output / "truth"


# --- a job from beginning to end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["rank", "node"])
def test_two_nodes_train_as_one_machine_does(tasks, calm, shards, tmp_path, short_truth):
    run = tmp_path / "run"
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked-for-ssh; exec false\n")
    ssh.chmod(0o755)
    path = f"PATH={ssh.parent}:{PATH}"
    done = launch(calm, shards, run, "--wait", "--tasks", tasks, "--env", path, **SHORT)
    assert not (tmp_path / "asked-for-ssh").exists()
    assert metrics(run) == metrics(short_truth)
    job = re.match(r"job (\d+): .*/job.sbatch\nfollow it with  tail -F .*\nend it with     scancel \1\n", done.stdout)[
        1
    ]
    assert "validation loss" in done.stdout  # the log was followed
    logs = run / "logs"
    assert {path.name for path in (logs / f"{job}-0").glob("*.out")} == {f"{tasks}-0.out", f"{tasks}-1.out"}
    assert {path.name for path in logs.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    places = {(logs / f"{job}-0" / f"rank-{rank}.started").read_text().split()[0] for rank in (0, 1)}
    assert places == set(NODES)
    assert calm.state(job)["JobState"] == "COMPLETED"


def test_setup_lines_variables_and_extra_directives_reach_the_ranks(calm, shards, tmp_path):
    run = tmp_path / "run"
    sees = "import os; print(os.environ['GREETING'], os.environ['LISTED'], os.environ['MADE'])"
    (tmp_path / "variables").write_text("# theirs\nGREETING=overruled\nLISTED='c d'\n")
    options = ["--pre-command", "export MADE=by-setup", "--env", "GREETING=a b", "--env-file", tmp_path / "variables"]
    options += ["--sbatch=--comment=extra", "--sbatch=--hold"]
    dry = launch(calm, shards, run, *options, "--dry-run", **SHORT).stdout
    assert not run.exists()
    job = submitted(calm, shards, run, *options, **SHORT)
    assert calm.state(job)["Comment"] == "extra"
    script = (run / "job.sbatch").read_text()
    assert script == dry
    probe = run / "probe.sbatch"  # the same script with another program
    probe.write_text(re.sub(r"-m fusiontree train .*", f'-c "{sees}"', script).replace("#SBATCH --hold\n", ""))
    done = calm.run("sbatch", "--wait", "--parsable", probe)
    number = done.stdout.strip()
    assert (run / "logs" / f"{number}-0" / "rank-1.out").read_text() == "a b c d by-setup\n"


def inside(runtime: str, folder: Path) -> list[object]:
    """Options that run the ranks in a container with a root of its own."""
    bundle = image(folder)
    if runtime == "crun":
        return ["--container", f"oci:{bundle}", "--env", f"PATH=/image/bin:{PATH}"]
    mounts = ",".join(f"{path}:{path}" for path in ("/usr", "/bin", "/lib", "/lib64", sys.base_prefix))
    container = ["--container", bundle / "rootfs", "--container-mounts", mounts]
    return [*container, "--env", "APPTAINERENV_PREPEND_PATH=/image/bin"]


@pytest.mark.parametrize("runtime", ["crun", "apptainer"])
def test_ranks_in_containers_save_and_come_back_and_go_on_exactly(runtime, calm, shards, tmp_path, truth):
    if shutil.which(runtime, path=PATH) is None:
        pytest.skip(f"no {runtime} here")
    run = tmp_path / "run"
    container = inside(runtime, tmp_path / "image")
    job = submitted(calm, shards, run, *container, **LONG)
    training(run, 8)
    places = [path.read_text().split() for path in (run / "logs" / f"{job}-0").glob("rank-*.started")]
    assert [calm.run("ls", f"/proc/{pid}/root/image/bin", on=node).stdout for node, pid in places] == ["python\n"] * 2
    calm.run("scancel", "--signal=USR1", job)
    came_back(calm, job, run, truth, "SIGUSR1")


def test_a_task_of_a_sweep_comes_back_by_itself(calm, shards, tmp_path):
    run = tmp_path / "run"
    axis = ["--nodes", 1, "--sweep", "optimizer.lr=1e-3,3e-4"]
    launched = calm.start(*words(shards, run, *axis, "--wait", **LONG))
    until((run / "job.id").exists, 60)
    job = (run / "job.id").read_text().strip()
    first, last = (tmp_path / f"run-lr{rate}" for rate in ("1e-3", "3e-4"))
    for one in (first, last):
        training(one, 8)
    calm.run("scancel", "--signal=USR1", f"{job}_1")  # the last task has the id of the whole array
    said = launched.communicate(timeout=180)[0]
    assert launched.returncode == 0, said
    assert "requeued: goes on from step" in said
    meetings = set(re.findall(r"meeting at (\S+);", said))
    assert len(meetings) == 3, said  # both tasks at once, perhaps on one node, and the second start of one
    states = [calm.state(f"{job}_{task}") for task in (0, 1)]
    assert [(state["JobState"], state["Restarts"]) for state in states] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    for one in (first, last):
        assert steps(one) == [*range(1, LONG["schedule__steps"] + 1)]
    assert metrics(first)[0]["lr"] == pytest.approx(metrics(last)[0]["lr"] * 10 / 3)


def test_the_doctor_looks_at_the_nodes_of_an_allocation(calm, shards, tmp_path):
    words = settings(shards, tmp_path / "out")
    doctor = [sys.executable, "-m", "fusiontree", "doctor", "tiny", "--json", "--nodes", 2, *words]
    report = json.loads(calm.run("salloc", "--nodes=2", "--quiet", *doctor).stdout)
    assert set(report["cluster"]["hosts"]) == set(NODES)
    assert report["cluster"]["hosts"]["node2"].endswith("12 (eth0)")
    assert all(rate["bus_gb_per_s"] > 0 for rate in report["cluster"]["all_reduce"].values())
    assert report["problems"] == []
    assert not (tmp_path / "out").exists()


# --- stopped and come back -------------------------------------------------------------------------------------------


def test_a_job_that_is_asked_to_save_comes_back_and_goes_on_exactly(calm, shards, tmp_path, truth):
    """As SLURM asks before the time limit: USR1 to the job's steps."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, logging__wandb="true", **LONG)
    for step in (8, 20):
        training(run, step)
        seen = status(calm, run)
        assert (seen["state"], seen["job"]["job"], seen["job"]["nodes"]) == ("running", job, list(NODES))
        calm.run("scancel", "--signal=USR1", job)
        until(lambda: calm.state(job)["JobState"] != "RUNNING", 60)
    came_back(calm, job, run, truth, "SIGUSR1", times=2)
    starts = [path.name.rpartition("-") for path in (run / "wandb").glob("offline-run-*")]
    assert (len(starts), len({run_id for _, _, run_id in starts})) == (3, 1)
    seen = status(calm, run)
    assert (seen["state"], seen["step"], seen["checkpoint"]["step"], seen["job"]["start"]) == ("finished", 60, 60, 2)
    assert seen["incidents"]["count"] == 4  # stopped twice, resumed twice


def test_a_preempted_job_saves_and_comes_back_and_goes_on_exactly(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 12)
    urgent = calm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    assert ended(calm, urgent.stdout.strip())["JobState"] == "COMPLETED"
    came_back(calm, job, run, truth, "SIGTERM")


def test_the_time_limit_requeues(calm, shards, tmp_path):
    run = tmp_path / "run"
    job = submitted(
        calm, shards, run, "--time", 1, "--save-ahead", 1, **LONG | {"schedule__steps": 2000, "checkpoint__every": 2000}
    )
    until(lambda: calm.state(job)["Restarts"] == "1", 120, "the requeue")
    before = max(steps(run))
    assert "requeued: goes on from step" in log(run, job)
    training(run, before + 2)
    written = steps(run)  # once: the run may still be writing
    assert written == sorted(set(written))
    assert before > 0


def test_a_cancelled_job_ends_at_once_and_stays_away(calm, shards, tmp_path):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 2)
    calm.run("scancel", job)
    assert ended(calm, job, 30)["JobState"] == "CANCELLED"
    time.sleep(8)  # longer than a requeued job is held
    assert calm.state(job)["JobState"] == "CANCELLED"
    assert not ranks(calm, run)


def test_a_killed_rank_is_named_and_the_job_goes_on_exactly(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 12)
    calm.run("kill", "-9", *[pid for node, pid in ranks(calm, run) if node == "node2"][-1:], on="node2")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert metrics(run) == metrics(truth)
    assert "rank 1 on node2 ended without a word" in log(run, job)


def test_a_full_disk_on_one_node_costs_checkpoints_and_not_the_run(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, **LONG)
    training(run, 7)
    with full_disk(calm, "node2", run / "checkpoints"):
        until(lambda: (run / "incidents.jsonl").exists(), 60, "a checkpoint that could not be written")
    assert "No space left on device" in (run / "incidents.jsonl").read_text()
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert metrics(run) == metrics(truth)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{LONG['schedule__steps']}\n"


def test_a_job_that_fails_again_and_again_is_given_up(calm, shards, tmp_path):
    """Its ranks cannot write their first checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / "checkpoints").write_text("in the way")
    done = launch(calm, shards, run, "--wait", code=1, **SHORT)
    assert "requeued: goes on from step 0" in done.stdout
    assert "not requeued: 2 starts from step 0 without a checkpoint beyond it" in done.stdout


def test_a_users_mistake_ends_the_job_with_its_code(calm, shards, tmp_path):
    run = tmp_path / "run"
    launch(calm, shards, run, "--wait", schedule__steps=1, schedule__warmup_steps=0)
    (run / "config.yaml").unlink()
    job = calm.run("sbatch", "--parsable", run / "job.sbatch").stdout.strip()
    known = ended(calm, job)
    assert (known["JobState"], known["ExitCode"]) == ("FAILED", "2:0")
    assert "is neither a file nor a preset" in log(run, job)


# --- lost nodes ------------------------------------------------------------------------------------------------------


def test_a_job_that_lost_a_node_goes_on_with_fewer(calm, shards, tmp_path, truth):
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--min-nodes", 1, **LONG)
    training(run, 12)
    calm.crash("node2")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert "on 1 of 2 nodes (1 at least)" in log(run, job)
    assert json.loads((run / "attempts.json").read_text())["nodes"] == ["node1"]
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(truth)]
    for here, there in zip(metrics(run), metrics(truth), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)


def test_a_half_that_is_cut_off_leaves_the_run_to_the_start_that_follows(calm, shards, tmp_path):
    """The half with the main rank and the job's script: it goes on living, on the same files."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--min-nodes", 1, **LONG)
    training(run, 12)
    calm.cut("node1")
    assert ended(calm, job)["JobState"] == "COMPLETED"
    assert json.loads((run / "attempts.json").read_text())["nodes"] == ["node2"]
    assert json.loads((run / "lease.json").read_text())["host"] == "node2"
    assert steps(run) == [*range(1, LONG["schedule__steps"] + 1)]
    written = contents(run)
    until(lambda: not ranks(calm, run), 120, "the end of the half that is still cut off")
    calm.settle()  # the cable is back
    time.sleep(2)
    assert contents(run) == written
    assert calm.state(job)["JobState"] == "COMPLETED"


def test_a_start_that_is_cut_off_and_could_train_on_ends_itself(calm, shards, tmp_path):
    """One node's ranks need no other: they train on, on the same files, until they look for the lease."""
    run = tmp_path / "run"
    job = submitted(calm, shards, run, "--nodes", 1, **LONG | {"schedule__steps": 100_000, "checkpoint__every": 20})
    training(run, 25)
    (node,) = {node for node, _ in ranks(calm, run)}
    calm.cut(node)
    until(lambda: json.loads((run / "lease.json").read_text())["host"] != node, 120, "the start that follows")
    until(lambda: node not in {where for where, _ in ranks(calm, run)}, 30, "the end of the one that was cut off")
    before = max(steps(run), default=0)
    training(run, before + 20)
    assert steps(run) == [*range(1, len(steps(run)) + 1)]
    assert "is now written by a newer start" in (run / "logs" / f"{job}-0" / "rank-0.json").read_text()
    assert calm.state(job)["JobState"] == "RUNNING"


# --- refused before anything is submitted ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "gpu"], "--partition gpu: no such partition; there are debug, urgent"),
        (["--nodes", 3], "SLURM refuses .*: Requested node configuration is not available"),
        (["--constraint", "ib"], "SLURM refuses .*: .*feature"),
        (["--sbatch=--nonsense"], "SLURM refuses .*"),
        (["--save-ahead", 700], "--time 10 is 600 s, and the ranks are asked to save 700 s before its end"),
    ],
)
def test_what_slurm_would_never_run_is_refused_in_one_line(options, message, calm, shards, tmp_path):
    failed = launch(calm, shards, tmp_path / "run", *options, code=2, batch__tokens=6144)
    assert re.match(f"fusiontree: error: {message}", failed.stderr)
    assert failed.stderr.count("\n") == 1
    assert calm.run("squeue", "--noheader").stdout == ""


def test_the_limit_of_the_partition_counts_where_none_is_given(calm, shards, tmp_path):
    run = tmp_path / "run"
    command = [word for word in words(shards, run, "--save-ahead", 700) if word not in ("--time", 10)]
    failed = calm.run(*command, code=2)
    assert "the partition's time limit 10:00 is 600 s, and the ranks are asked to save 700 s before" in failed.stderr
    assert calm.run(*command, "--partition", "urgent", code=2).stderr == failed.stderr
    assert not run.exists()
