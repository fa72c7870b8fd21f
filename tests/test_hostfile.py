"""Launches on a hostfile: parsed as DeepSpeed parses it, checked before any process starts, rendered completely."""

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_manifest

from fusiontree import cli
from fusiontree.config import load_config
from fusiontree.errors import StoppedError, UserError
from launcher import heartbeat, hostfile, job, local, multihost
from launcher.job import LaunchOptions, Plan, plan_hosts

NOTHING = LaunchOptions()
HOSTS = "# two kinds\nnode1 slots=4\n\nnode2   slots=2  # the old one\n"


@pytest.fixture
def hosts_file(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(HOSTS)
    return path


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Remove all forwarded variables from the environment, and replace the home folder."""
    for name in list(os.environ):
        if name.startswith(job.FORWARDED) or name in ("LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def planned(hosts: dict[str, tuple[int, ...]], options: LaunchOptions = NOTHING) -> Plan:
    made = Plan(
        nodes=len(hosts),
        ranks_per_node=2,
        program=("fusiontree", "train", "/runs/a/config.yaml"),
        environment=dict(options.environment),
        master_address=next(iter(hosts)),
        master_port=21000,
        hosts=hosts,
        setup=options.setup,
    )
    assert made.world_size == sum(map(len, hosts.values()))
    return made


# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("node2", ""), ("node1:0,2@node2:1", ""), ("", "node1"), ("", "node1:1,3"), ("", "node2:0,1")],
)
def test_slots_are_selected_as_by_deepspeed(include, exclude, hosts_file):
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    expected = parse_inclusion_exclusion(fetch_hostfile(str(hosts_file)), include, exclude)
    found = hostfile.read(hosts_file, include, exclude)
    assert {host: list(slots) for host, slots in found.items()} == dict(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=1\nnode2 slots=1\nnode1 slots=2\n", "line 3: node1 is listed twice"),
        ("node1 slots=0\n", "line 1: node1 has no slots"),
        ("node1\n", "line 1: 'node1' is not of the form NAME slots=N"),
        ("node1 slots=two\n", "line 1: 'node1 slots=two' is not"),
        ("# nothing\n\n", "lists no host"),
    ],
)
def test_a_malformed_hostfile_is_refused_with_its_line_number(text, message, tmp_path):
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        hostfile.read(path)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node3", "", r"--include node3: node3 is not in the hostfile; choose from node1, node2"),
        ("node2:2", "", r"--include node2:2: node2 has only the slots 0 to 1"),
        ("node2:x", "", r"'node2:x' is not of the form HOST:SLOT,SLOT"),
        ("", "node1@node2", "--exclude node1@node2 leaves no slot of .*; exclude fewer"),
        ("node1", "node2", "cannot be combined; remove one"),
    ],
)
def test_an_invalid_selection_is_refused(include, exclude, message, hosts_file):
    with pytest.raises(UserError, match=message):
        hostfile.read(hosts_file, include, exclude)


def test_a_missing_hostfile_or_program_is_refused_in_one_line(tmp_path, hosts_file, monkeypatch, capsys):
    write_manifest(tmp_path, 8192)
    words = [f"data.path={tmp_path}", f"output={tmp_path}/runs"]
    assert cli.main(["launch", "tiny", "--hostfile", "nowhere", *words]) == 2
    assert (
        capsys.readouterr().err
        == "fusiontree: error: --hostfile nowhere does not exist; give a file with one line `NAME slots=N` per host\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "tiny", "--hostfile", str(hosts_file), "--include", "node2", *words]) == 2
    assert capsys.readouterr().err.startswith("fusiontree: error: --hostfile: no ssh on PATH")
    assert not (tmp_path / "runs").exists()


# --- rendering -------------------------------------------------------------------------------------------------------


def test_deepspeed_parses_the_command_as_planned(tmp_path, monkeypatch):
    from deepspeed.launcher.launch import parse_args

    made = planned({"node1": (1, 3), "node2": (0,)}, LaunchOptions(setup=("module load cuda",)))
    command = ["pdsh", "-R", "ssh", "-S", "-f", "1024", "-w", "node1,node2", f"bash {tmp_path}/start.sh %n"]
    assert multihost.render(made, "pdsh", tmp_path) == command
    *lines, last = multihost.launch_files(made, "pdsh", tmp_path)["start.sh"].splitlines()
    assert "module load cuda" in lines
    words = shlex.split(last.replace('"$1"', "1"))
    assert words[:5] == ["exec", sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr(sys, "argv", words[4:])
    args = parse_args()
    assert json.loads(base64.urlsafe_b64decode(args.world_info)) == {"node1": [1, 3], "node2": [0]}
    assert (args.node_rank, args.master_addr, args.master_port) == (1, "node1", 21000)
    assert (args.module, args.no_local_rank, args.training_script) == (True, True, "fusiontree")
    assert args.training_script_args == ["train", "/runs/a/config.yaml"]


def test_the_paths_of_the_launch_reach_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a b:/c")
    script = multihost.launch_files(planned({"node1": (0,)}), "pdsh", tmp_path)["start.sh"]
    assert script.startswith("export PATH=/usr/bin:/bin\nexport PYTHONPATH='/a b:/c'\ncd ")


def test_launch_options_override_deepspeeds_environment_file(tmp_path):
    write_manifest(tmp_path, 8192)
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=ib0\nOMP_NUM_THREADS=8\nNCCL_DEBUG=INFO\n")
    config = load_config("tiny", [f"data.path={tmp_path}"])
    made = plan_hosts(config, {"node1": (0,)}, [], LaunchOptions({"NCCL_DEBUG": "WARN"}))
    assert made.environment == {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "8", "NCCL_DEBUG": "WARN"}


def test_network_variables_reach_the_ranks_and_secrets_do_not(tmp_path, monkeypatch):
    write_manifest(tmp_path, 8192)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "1234")
    config = load_config("tiny", [f"data.path={tmp_path}"])
    options = job.launch_options(["NCCL_DEBUG=WARN", "A=b=c"], None, [])
    made = plan_hosts(config, {"node1": (0, 1)}, [], options)
    assert made.environment == {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN", "A": "b=c"}
    assert 20_000 <= made.master_port < 31_000


def test_an_environment_file_may_have_comments_and_quotes(tmp_path):
    path = tmp_path / "env"
    path.write_text("# comment\n\nA=1\nexport B='two words'\nC=\"3\"\nD=x=y\n")
    assert job.launch_options(["A=2"], path, ["ls"]).environment == {"A": "2", "B": "two words", "C": "3", "D": "x=y"}


def test_open_mpi_takes_only_the_first_slots_of_a_host(tmp_path):
    made = planned({"node1": (0, 1), "node2": (0,)})
    command = ["mpirun", "-n", "3", "-hostfile", f"{tmp_path}/hostfile", "--bind-to", "none"]
    assert multihost.render(made, "openmpi", tmp_path) == [*command, "bash", f"{tmp_path}/start.sh"]
    assert multihost.launch_files(made, "openmpi", tmp_path)["hostfile"] == "node1 slots=2\nnode2 slots=1\n"
    with pytest.raises(UserError, match="takes the first slots of a host"):
        multihost.render(planned({"node1": (1,)}), "openmpi", tmp_path)


def test_after_a_failure_ranks_on_other_hosts_have_less_than_ten_seconds(tmp_path):
    graces = []

    class Sender:
        def request_stop(self, grace):
            graces.append(grace)
            (tmp_path / "requested").touch()

    (tmp_path / "rank-0.json").write_text('{"rank": 0, "host": "a", "code": 1, "message": "wrong", "time": 1}')
    wait = f"for _ in {{1..400}}; do test -e {tmp_path}/requested && exit; sleep 0.05; done; exit 1"
    assert multihost._supervise(["bash", "-c", wait], dict(os.environ), tmp_path, Sender()) == (0, None)
    assert local.POLL_INTERVAL + heartbeat.INTERVAL + graces[0] < 10  # notice the failure, read the request, exit


def test_a_launch_that_is_stopped_before_any_rank_starts_can_start_again(tmp_path):
    with pytest.raises(StoppedError, match=r"^stopped by SIGTERM before any rank started; start again$"):
        multihost._exit_code(tmp_path, 2, 1, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        multihost._exit_code(tmp_path, 2, 1, signal.SIGINT)
    assert multihost._exit_code(tmp_path, 2, 3, None) == 3


# --- the heartbeat ---------------------------------------------------------------------------------------------------

WATCHED = """
import signal, sys, threading
from pathlib import Path
from launcher import heartbeat
if len(sys.argv) > 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
heartbeat.INTERVAL, heartbeat.MAX_MISSED = 0.02, 50
threading.Thread(target=heartbeat.watch, args=(Path(sys.argv[1]), 60.0), daemon=True).start()
print("up", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def watcher(tmp_path, monkeypatch):
    """Return a function that starts a process which watches the heartbeat in `tmp_path`."""
    processes = []

    def start(*words: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", WATCHED, str(tmp_path), *words], stdout=subprocess.PIPE)
        processes.append(process)
        process.stdout.readline()
        return process

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_rank_runs_while_heartbeats_arrive_and_ends_with_the_launch(watcher, tmp_path):
    with heartbeat.sending(tmp_path, 9.0):
        process = watcher()
        time.sleep(2)  # twice the time after which a launch counts as dead
        assert process.poll() is None
    assert process.wait(timeout=10) == -signal.SIGTERM
    assert (tmp_path / heartbeat.FILE).read_text() == "stop 9.0"


@pytest.mark.slow
def test_a_rank_ends_when_its_launch_was_killed(watcher, tmp_path):
    (tmp_path / heartbeat.FILE).write_text("7")
    assert watcher().wait(timeout=10) == -signal.SIGTERM


@pytest.mark.slow
def test_a_rank_that_does_not_exit_in_time_is_killed(watcher, tmp_path):
    (tmp_path / heartbeat.FILE).write_text("stop 0.5")
    assert watcher("stubborn").wait(timeout=10) == -signal.SIGKILL
