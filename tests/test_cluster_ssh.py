"""Jobs on real ssh hosts by pdsh and Open MPI: complete, stopped, killed, partitioned; no host keeps a rank."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from cluster import NODES, PATH, Cluster, full_disk, ranks, training, until, why_not
from conftest import LONG, metrics, settings

pytestmark = pytest.mark.cluster
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def hosts(tmp_path) -> Path:
    """Return a hostfile of both nodes."""
    path = tmp_path / "hostfile"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


@pytest.fixture(params=["pdsh", "openmpi"])
def launcher(request) -> list[str]:
    """Return the options of each launcher."""
    if request.param == "openmpi" and shutil.which("mpirun", path=PATH) is None:
        pytest.skip("no mpirun here (Debian: openmpi-bin)")
    return ["--launcher", request.param]


AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def words(shards: Path, run: Path, hosts: Path, *options: object, **changes: object) -> list[object]:
    """Return the command of a launch."""
    target = ["--hostfile", hosts, "--env", "DS_ACCELERATOR=cpu", *options]
    values = settings(shards, run.parent, name=run.name, **LONG | changes)
    return [sys.executable, "-m", "fusiontree", "launch", "tiny", *target, *values]


def refusal(cluster: Cluster, *command: object) -> str:
    """Return the error message of a launch that is refused."""
    return cluster.run(*command, code=2).stderr.splitlines()[-1]


def stop(cluster: Cluster, run: Path, number: signal.Signals) -> None:
    """Send a signal to the launch of `run`, as a user on the head node would."""
    cluster.run("pkill", f"-{number.name[3:]}", "-f", f"fusiontree launch .* name={run.name}$")


def test_two_hosts_train_like_one_machine_and_resume_after_a_stop(calm, shards, tmp_path, hosts, truth, launcher):
    run = tmp_path / "run"
    options = ["--env", "GREETING=a 'b' $c", "--pre-command", "export MADE=by-setup"]
    first = calm.start(*words(shards, run, hosts, *launcher, *options), **AS_ROOT)
    training(run, 12)
    pid = next(pid for node, pid in ranks(calm, run) if node == "node2")
    environment = calm.run("cat", f"/proc/{pid}/environ", on="node2").stdout.split("\0")
    seen = dict(line.split("=", 1) for line in environment if "=" in line)
    assert (seen["GREETING"], seen["MADE"], seen["RANK"], seen["MASTER_ADDR"]) == ("a 'b' $c", "by-setup", "1", "node1")
    stop(calm, run, signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 75, output
    assert "stopped by SIGTERM" in output
    assert not ranks(calm, run)
    calm.run(*words(shards, run, hosts, *launcher), **AS_ROOT)
    assert metrics(run) == metrics(truth)
    assert {path.name for path in (run / "logs").glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}


def test_paths_and_variables_are_not_interpreted_on_the_way(calm, shards, tmp_path, monkeypatch, hosts, launcher):
    here, run = tmp_path / "a 'b' $(touch executed) %h", tmp_path / 'c "d" $(touch executed) %n exp[12]' / "run"
    here.mkdir()
    monkeypatch.chdir(here)
    value = "$(touch executed)\n `touch executed` 'x"
    command = words(shards, run, hosts, *launcher, "--env", f"GREETING={value}", schedule__steps=3)
    calm.run(*command, PYTHONPATH=str(Path(__file__).parents[1]), **AS_ROOT)
    assert metrics(run)
    assert not list(tmp_path.rglob("executed"))


def test_the_doctor_probes_the_hosts_of_a_hostfile(calm, shards, tmp_path, hosts):
    words = settings(shards, tmp_path / "out")
    doctor = [sys.executable, "-m", "fusiontree", "doctor", "tiny", "--json", "--nodes", 2, "--hostfile", hosts, *words]
    done = calm.run(*doctor)
    report = json.loads(done.stdout[done.stdout.index("{\n") :])  # DeepSpeed's launcher prints lines of its own first
    assert set(report["cluster"]["hosts"]) == set(NODES)
    assert report["problems"] == []
    assert not (tmp_path / "out").exists()


def test_a_killed_rank_ends_the_launch_and_is_named(calm, shards, tmp_path, hosts, launcher):
    run = tmp_path / "run"
    process = calm.start(*words(shards, run, hosts, *launcher), **AS_ROOT)
    training(run, 12)
    calm.run("kill", "-9", *[pid for node, pid in ranks(calm, run) if node == "node2"][-1:], on="node2")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert re.search(r"fusiontree: error: rank 1 on node2 ended without an exit report", output), output
    until(lambda: not ranks(calm, run), 150, "the end of all ranks")


def test_ranks_end_after_their_launch_was_killed(calm, shards, tmp_path, hosts):
    run = tmp_path / "run"
    process = calm.start(*words(shards, run, hosts, schedule__steps=100_000, checkpoint__every=100_000))
    training(run, 12)
    stop(calm, run, signal.SIGKILL)
    process.wait(timeout=10)
    assert ranks(calm, run)
    until(lambda: not ranks(calm, run), 150, "the end of all ranks")
    assert (run / "checkpoints" / "latest").exists()  # they have saved


def test_an_unusable_host_is_named_before_any_rank_starts(calm, shards, tmp_path, hosts):
    run = tmp_path / "run"
    command = words(shards, run, hosts)
    hosts.write_text("node1 slots=1\nnode7 slots=1\n")
    unknown = "fusiontree: error: host node7 cannot be used: ssh: Could not resolve hostname node7"
    assert refusal(calm, *command).startswith(unknown)
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    calm.cut("node2")
    assert re.match(r"fusiontree: error: host node2 cannot be used: .*(timed out|No route)", refusal(calm, *command))
    calm.boot("node2")
    calm.run("mount", "-t", "tmpfs", "tmpfs", tmp_path, on="node2")  # a disk that is not shared
    elsewhere = refusal(calm, *command)
    calm.run("umount", tmp_path, on="node2")
    assert re.match(r"fusiontree: error: host node2 does not see .*; put the run's output on a shared disk", elsewhere)
    assert not ranks(calm, run)


@pytest.mark.parametrize("harm", ["cut", "crash"])
def test_a_lost_host_ends_the_launch_promptly(harm, calm, shards, tmp_path, hosts):
    run = tmp_path / "run"
    process = calm.start(*words(shards, run, hosts), PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=2")
    training(run, 12)
    getattr(calm, harm)("node2")
    process.communicate(timeout=120)
    assert process.returncode == 1
    until(lambda: not ranks(calm, run), 60, "the end of all ranks, including the stale one")
    before = json.loads((run / "lease.json").read_text())
    calm.run(*words(shards, run, hosts, "--include", "node1"))  # resumes on the remaining host
    assert json.loads((run / "lease.json").read_text()) != before


def test_a_full_disk_on_one_host_fails_checkpoints_but_not_the_run(calm, shards, tmp_path, hosts, truth):
    run = tmp_path / "run"
    process = calm.start(*words(shards, run, hosts))
    training(run, 7)
    with full_disk(calm, "node2", run / "checkpoints"):
        until(lambda: (run / "incidents.jsonl").exists(), 60, "a checkpoint that could not be written")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "No space left on device" in (run / "incidents.jsonl").read_text()
    assert metrics(run) == metrics(truth)
