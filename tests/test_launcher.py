"""A local launch: its checks before any process starts, its run through DeepSpeed's launcher, and its end."""

import contextlib
import errno
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

import launcher.job
from fusiontree import cli
from fusiontree.config import load_config
from fusiontree.distributed import outcome
from fusiontree.distributed.ports import free_port
from fusiontree.errors import LOST_PEER, HungError, RunError, StoppedError, UserError
from fusiontree.run import lease
from fusiontree.run.folder import CONFIG_FILE
from launcher import local
from launcher.job import Plan, plan_local, visible_gpus

# program of each rank in place of training: rank N does the N-th argument
RANK = """
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path
from fusiontree.distributed import outcome
from launcher.join import join_launcher

def save_and_leave(number, frame):
    with open(here / ("received-" + os.environ["RANK"]), "a") as received:
        received.write(signal.Signals(number).name)
    time.sleep(2)
    outcome.report(75, None)
    sys.exit(75)

join_launcher()
here, task = Path(sys.argv[1]), sys.argv[2 + int(os.environ["RANK"])]
(here / ("pid-" + os.environ["RANK"])).write_text(str(os.getpid()))
if task == "stay":
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(120)
elif task == "leave a child running":
    child = subprocess.Popen(["sleep", "120"])
    (here / "pid-child").write_text(str(child.pid))
    outcome.report(0, None)
elif task == "stay stubbornly":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(120)
elif task == "save and leave":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save_and_leave)
    (here / ("listening-" + os.environ["RANK"])).touch()
    time.sleep(120)
elif task == "be killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif task == "kill DeepSpeed's launcher":
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(120)
elif task == "end well, then abort":
    outcome.report(0, None)
    os.abort()
elif task == "end well":
    outcome.report(0, None)
elif task == "see the environment":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    (here / ("environment-" + os.environ["RANK"])).write_text(" ".join(os.environ[name] for name in names))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    outcome.report(0, None)
elif task.startswith("fail: "):
    outcome.report(2, task.removeprefix("fail: "))
    sys.exit(2)
elif task.startswith("exit "):
    sys.exit(int(task.removeprefix("exit ")))
"""

# replaces `fusiontree launch` in tests that send signals
LAUNCH = """
import json, os, sys
from launcher import local
from launcher.job import Plan
local.GRACE = float(os.environ.get("GRACE", "30"))
try:
    print("code", local.run(Plan(**json.loads(sys.argv[1]))))
except BaseException as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a function that plans a job with one task per rank."""
    (tmp_path / "rank_stand_in.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def plan_job(*tasks: str) -> Plan:
        return Plan(
            nodes=1,
            ranks_per_node=len(tasks),
            program=("rank_stand_in", str(tmp_path), *tasks),
            environment={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            master_address="127.0.0.1",
            master_port=free_port(),
        )

    return plan_job


@pytest.fixture
def started(job, tmp_path):
    """Return a function that starts a job in its own process and waits for its ranks; kill the rest afterwards."""
    processes = []

    def start(*tasks: str, **environment: str) -> subprocess.Popen:
        fields = {name: getattr(job(*tasks), name) for name in Plan.__dataclass_fields__}
        argv = [sys.executable, "-c", LAUNCH, json.dumps(fields)]
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment | {"TMPDIR": str(tmp_path)},
        )
        processes.append(process)
        expect(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in range(len(tasks))))
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    for path in tmp_path.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def expect(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no success within {seconds} s"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Return whether process `pid` exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ranks_running(tmp_path) -> list[int]:
    return [pid for path in tmp_path.glob("pid-*") if running(pid := int(path.read_text()))]


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_manifest(folder, 8192)
    return folder


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Simulate a machine with four cores and no GPU."""
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "FUSIONTREE_LAUNCH", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(launcher.job, "visible_gpus", list)


def planned(dataset, ranks: int, *overrides: str) -> Plan:
    words = [f"data.path={dataset}", *overrides]
    return plan_local(load_config("tiny", words), "tiny", words, ranks)


def test_the_plan_divides_the_cores_and_sets_the_accelerator(dataset):
    made = planned(dataset, 2, "seed=3")
    assert (made.nodes, made.ranks_per_node, made.world_size, made.devices) == (1, 2, 2, None)
    assert made.program == ("fusiontree", "train", "tiny", f"data.path={dataset}", "seed=3")
    assert made.environment == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
    assert 1024 < made.master_port < 65536
    assert planned(dataset, 4).environment["OMP_NUM_THREADS"] == "1"


def test_more_ranks_than_cores_get_one_thread_each(dataset):
    assert planned(dataset, 8, "batch.tokens=8192").environment["OMP_NUM_THREADS"] == "1"


def test_the_callers_environment_takes_precedence(dataset, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert planned(dataset, 2).environment == {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (0, [], "--local is 0; it must be at least 1"),
        (3, [], "does not divide among 3 ranks"),
        (2, ["data.path=nowhere"], "data.path nowhere: no manifest.json there"),
        (2, ["deepspeed=zero7"], "deepspeed 'zero7' is neither"),
        (2, ["model.vocab_size=100"], "8192 tokens, more than model.vocab_size 100"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_a_process_starts(
    ranks, overrides, message, dataset, monkeypatch, capsys
):
    monkeypatch.setattr(local.subprocess, "Popen", None)
    argv = ["launch", "tiny", "--local", str(ranks), f"data.path={dataset}", *overrides]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("allowed", ["losses.gate_balance.0", "losses.gate_balance"])
def test_a_changed_value_is_refused_unless_it_or_its_table_is_allowed(allowed, tmp_path):
    before, after = (load_config("tiny", [f"output={tmp_path}", f"losses.gate_balance={x}"]) for x in (0.1, 0.2))
    (launcher.job.prepare_run(before) / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"other values of losses\.gate_balance\.0;"):
        launcher.job.prepare_run(after)
    assert load_config(str(launcher.job.prepare_run(after, [allowed]) / CONFIG_FILE)) == after


def test_a_start_that_a_full_disk_ended_is_completed_by_the_next(dataset, tmp_path, monkeypatch):
    """The lease fits on the last free page, the configuration does not."""
    config = load_config("tiny", [f"data.path={dataset}", f"output={tmp_path / 'runs'}"])
    run = config.run_dir

    def full(path, content):
        (run / f".{path.name}.partial-7").touch()  # as SIGKILL leaves it
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(launcher.job, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            launcher.job.prepare_run(config)
    lease.take(run)
    assert not (run / CONFIG_FILE).exists()
    assert launcher.job.prepare_run(config) == run
    assert load_config(str(run / CONFIG_FILE)) == config


@pytest.mark.parametrize("other", ["notes.txt", "lease.json.bak", "checkpoints"])
def test_a_folder_with_other_contents_is_not_taken_for_a_failed_start(other, dataset, tmp_path):
    config = load_config("tiny", [f"data.path={dataset}", f"output={tmp_path / 'runs'}"])
    (config.run_dir / "logs").mkdir(parents=True)
    (config.run_dir / other).touch()
    with pytest.raises(UserError, match="has other contents"):
        launcher.job.prepare_run(config)


@pytest.mark.parametrize(("chosen", "gpus"), [(None, ["2", "10"]), ("10", ["10"]), ("", []), ("-1", [])])
def test_visible_gpus_respect_cuda_visible_devices(chosen, gpus, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia10"), Path("/dev/nvidia2")])
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == gpus


def test_each_rank_needs_a_gpu(dataset, monkeypatch):
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["0", "1"])
    made = planned(dataset, 2)
    assert (made.environment["DS_ACCELERATOR"], made.devices) == ("cuda", None)
    with pytest.raises(UserError, match=r"--local 4 needs 4 GPUs, but this machine has 2: 0,1"):
        planned(dataset, 4)


def test_the_plan_uses_the_gpus_in_cuda_visible_devices(dataset, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["3", "1"])
    assert planned(dataset, 2).devices == (3, 1)
    assert planned(dataset, 1).devices == (3,)
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["GPU-8f3a"])
    with pytest.raises(UserError, match="takes only indices"):
        planned(dataset, 1)


def test_the_dry_run_prints_one_line_to_paste(dataset, capsys):
    argv = ["launch", "tiny", "--dry-run", "--local", "2", f"data.path={dataset}", "name=a b"]
    assert cli.main(argv) == 2  # names must not contain blanks
    capsys.readouterr()
    assert cli.main([*argv[:-1], "output=a b"]) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed)
    port = words[words.index("--master_port") + 1]
    assert printed.count("\n") == 1
    assert words == [
        *("env", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=2", sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", "/dev/null", "--num_nodes", "1", "--num_gpus", "2", "--master_addr", "127.0.0.1"),
        *("--master_port", port, "--log_level", "critical", "--no_local_rank", "--module"),
        *("fusiontree", "train", "tiny", f"data.path={dataset}", "output=a b"),
    ]


@pytest.mark.parametrize("target", ["--local 2", "--hostfile hosts", "--slurm --ranks-per-node 2"])
def test_every_target_passes_the_resume_options_to_its_ranks(target, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1 slots=2\n")
    options = ["--trust-checkpoint", "--allow-changed", "seed", "--dry-run", f"data.path={dataset}"]
    assert cli.main(["launch", "tiny", *target.split(), *options]) == 0
    words = shlex.split(capsys.readouterr().out, comments=True)
    assert {"--trust-checkpoint", "--allow-changed=seed"} <= set(words)


def test_deepspeed_parses_the_devices_as_planned(job):
    from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

    made = job("end well", "end well")
    argv = local.render(Plan(**{**vars(made), "devices": (2, 3)}))
    args = parse_args(argv[3:])
    assert parse_inclusion_exclusion({"localhost": 4}, args.include, args.exclude) == {"localhost": [2, 3]}
    assert (args.num_gpus, args.num_nodes) == (-1, -1)
    assert (args.user_script, tuple(args.user_args)) == (made.program[0], made.program[1:])


# --- the run, through DeepSpeed's launcher ---------------------------------------------------------------------------


def test_ranks_get_their_variables_and_default_signal_handlers(job, tmp_path):
    made = job("see the environment", "see the environment")
    assert local.run(made) == 0
    seen = [(tmp_path / f"environment-{rank}").read_text() for rank in (0, 1)]
    assert seen == [f"{rank} {rank} 2 cpu 1 127.0.0.1 {made.master_port}" for rank in (0, 1)]


def test_a_user_error_of_a_rank_is_raised_without_output_from_deepspeed(job, capfd):
    with pytest.raises(UserError, match=r"^(rank \d: )?wrong input$") as caught:
        local.run(job("fail: wrong input", "fail: wrong input"))
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


def test_a_failing_rank_is_named_and_the_others_end(job, tmp_path):
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local.run(job("stay", "fail: wrong input"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_killed_rank_fails_the_run_with_the_signals_name(job, tmp_path):
    with pytest.raises(RunError, match=r"^rank 0 was killed by SIGKILL"):
        local.run(job("be killed", "stay"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_killed_deepspeed_launcher_fails_the_run_and_leaves_no_orphans(job, tmp_path):
    with pytest.raises(RunError, match="DeepSpeed's launcher was killed"):
        local.run(job("kill DeepSpeed's launcher", "stay"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_ranks_that_outlive_a_failed_one_are_killed_and_its_last_lines_shown(job, tmp_path, capsys):
    """DeepSpeed's launcher would wait 30 s for each rank that hangs, e.g. in a device kernel."""
    (tmp_path / "rank-0.log").write_text("".join(f"line {number}\n" for number in range(30)))
    with pytest.raises(
        RunError, match=r"^rank 0 died without an exit report"
    ):  # 'was killed by SIGKILL' if DeepSpeed had ended it
        local.run(job("be killed", "stay stubbornly"), tmp_path)
    expect(lambda: not ranks_running(tmp_path), seconds=5)
    shown = capsys.readouterr().err
    assert shown.endswith("line 29\n")
    assert "line 20\n" in shown
    assert "line 19\n" not in shown


def test_no_rank_stays_as_a_zombie(started, monkeypatch):
    """Here this process is what the first process of a container is: the parent of orphans, which reaps none."""
    local._adopt_orphans(True)
    try:
        process = started("stay stubbornly", "stay stubbornly", GRACE="1")
        process.send_signal(signal.SIGTERM)  # both are killed, with DeepSpeed's launcher
        process.communicate(timeout=25)
        stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
        assert not [stat for stat in stats if (stat[0], int(stat[1])) == ("Z", os.getpid())]
    finally:
        local._adopt_orphans(False)


def test_after_a_failure_the_other_ranks_have_less_than_ten_seconds(job, tmp_path, monkeypatch):
    remaining = []

    class Forwarder(local._SignalForwarder):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "deadline":
                remaining.append(value - time.monotonic())

    (tmp_path / "rank-0.json").write_text(json.dumps(report(0, 1, "wrong", 5)))
    monkeypatch.setattr(local, "_SignalForwarder", Forwarder)
    monkeypatch.setattr(local, "render", lambda plan: ["sleep", "1"])
    local._supervise(job("stay", "stay"), tmp_path)
    assert remaining[1] + 2 * local.POLL_INTERVAL < 10  # one poll to notice the failure, one to kill the others


JOIN = """
import fcntl, sys
from pathlib import Path
from launcher import local
from launcher.join import join_launcher

def locking(*words, flock=fcntl.flock):
    print(*folder.glob("running-*"))
    flock(*words)

folder, fcntl.flock = Path(sys.argv[1]), locking
join_launcher()
print(local._find_failure(folder))
"""


def test_a_rank_that_is_joining_does_not_count_as_dead(tmp_path):
    environment = os.environ | {outcome.LAUNCH_FOLDER: str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", JOIN, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["", str(tmp_path / "running-0"), "(False, None)"], done.stderr


def test_the_report_of_a_lost_peer_does_not_hide_a_dead_rank():
    reports = [report(0, 1, "another rank has ended", 5)]
    with pytest.raises(RunError, match=r"^rank 1 was killed by SIGKILL"):
        local._exit_code(reports, 2, returned=256 - signal.SIGKILL, stopped_by=None, dead_rank=1)
    with pytest.raises(RunError, match=r"^rank 1 died without an exit report"):
        local._exit_code(reports, 2, returned=1, stopped_by=None, dead_rank=1)


def test_an_earlier_report_of_a_lost_peer_does_not_hide_the_cause(monkeypatch, tmp_path):
    monkeypatch.setenv(outcome.LAUNCH_FOLDER, str(tmp_path))
    (tmp_path / "running-0").touch()
    outcome.report(1, LOST_PEER)
    assert local._find_failure(tmp_path) == (True, None)  # no other rank has failed
    (tmp_path / "running-1").touch()  # unlocked: its rank is dead
    assert local._find_failure(tmp_path) == (True, 1)
    with pytest.raises(RunError, match=r"^rank 1: wrong$"):
        local._exit_code([report(0, 1, LOST_PEER, 5), report(1, 1, "wrong", 6)], 2, returned=1, stopped_by=None)


def test_a_child_process_of_a_rank_does_not_outlive_the_run(job, tmp_path):
    assert local.run(job("leave a child running")) == 0
    assert (tmp_path / "pid-child").exists()
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_rank_that_aborts_after_its_report_does_not_fail_the_run(job):
    assert local.run(job("end well, then abort", "end well")) == 0


@pytest.mark.parametrize(
    ("number", "printed"),
    [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "RunError stopped by SIGTERM")],
)
def test_a_stop_signal_reaches_every_rank(number, printed, started, tmp_path):
    process = started("stay", "stay")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert output.startswith(printed)
    assert errors == ""
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_ranks_that_ignore_a_stop_are_killed_after_the_grace(started, tmp_path):
    process = started("stay stubbornly", "stay stubbornly", GRACE="1")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=25)[0].startswith("RunError stopped by SIGTERM")
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_second_signal_ends_the_grace(started, tmp_path):
    process = started("stay stubbornly", "stay stubbornly")
    process.send_signal(signal.SIGTERM)
    time.sleep(local.REPEAT + 0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=25)[0].startswith("RunError stopped by SIGTERM")
    expect(lambda: not ranks_running(tmp_path), seconds=5)


@pytest.mark.parametrize(("code", "kind"), [(75, StoppedError), (76, HungError), (2, UserError), (1, RunError)])
def test_a_ranks_code_and_message_are_kept(code, kind):
    with pytest.raises(kind, match=r"^words$") as caught:
        local._exit_code(
            [report(0, code, "words", 1), report(1, code, "words", 2)], 2, returned=1, stopped_by=signal.SIGTERM
        )
    assert caught.value.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stopped_rank_may_save_and_choose_its_exit_code(number, started, tmp_path):
    process = started("save and leave")
    expect((tmp_path / "listening-0").exists)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "code 75\n"
    # only once: DeepSpeed's launcher would repeat the signal, and kill after 30 s
    assert (tmp_path / "received-0").read_text() == number.name


def test_a_job_that_is_stopped_before_its_ranks_start_ends_at_once(tmp_path):
    stop = local._SignalForwarder(tmp_path, ranks=2)
    (tmp_path / "rank-0.started").write_text(f"here {os.getpid()}")
    with local.handling_signals(lambda *_: None):
        stop(signal.SIGUSR1, None)
    assert (stop.signal, stop.starting) == (signal.SIGUSR1, True)
    assert stop.deadline <= time.monotonic()
    with pytest.raises(StoppedError, match=r"^stopped by SIGUSR1 before the first step; start again$"):
        local._exit_code([], 2, 256 - signal.SIGKILL, stop.signal, stop.starting, dead_rank=0)
    with pytest.raises(KeyboardInterrupt):
        local._exit_code([], 2, 256 - signal.SIGKILL, signal.SIGINT, True)


def test_ranks_end_when_their_launch_is_killed(started, tmp_path):
    process = started("stay", "stay")
    assert len(ranks_running(tmp_path)) == 2
    process.kill()
    expect(lambda: not ranks_running(tmp_path))


# --- the exit code ---------------------------------------------------------------------------------------------------


def report(rank: int, code: int, message: str | None, when: int) -> dict:
    return {"rank": rank, "host": "here", "code": code, "message": message, "time": when}


def test_the_earliest_failure_decides():
    reports = [report(0, 1, "connection lost", 9), report(1, 2, "wrong input", 5)]
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local._exit_code(reports, 2, returned=1, stopped_by=None)


def test_a_failure_that_all_ranks_share_names_no_rank():
    reports = [report(0, 2, "wrong input", 9), report(1, 2, "wrong input", 5)]
    with pytest.raises(UserError, match=r"^wrong input$"):
        local._exit_code(reports, 2, returned=2, stopped_by=None)
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local._exit_code(reports[1:], 2, returned=2, stopped_by=None)


def test_a_failure_with_a_traceback_returns_its_code():
    assert local._exit_code([report(0, 1, None, 3)], 2, returned=1, stopped_by=None) == 1


@pytest.mark.parametrize("returned", [1, 2])
def test_without_a_report_deepspeeds_code_is_returned(returned):
    assert local._exit_code([], 2, returned, stopped_by=None) == returned


def test_success_needs_a_report_from_every_rank():
    with pytest.raises(RunError, match="launcher was killed"):
        local._exit_code([report(0, 0, None, 3)], 2, returned=0, stopped_by=None)


def test_a_rank_without_a_launch_folder_writes_no_report(monkeypatch, tmp_path):
    assert outcome.report(1, "words") is False
    monkeypatch.setenv("FUSIONTREE_LAUNCH", str(tmp_path / "gone"))
    assert outcome.report(1, "words") is False


def test_a_damaged_configuration_of_the_run_is_written_again(tmp_path, capsys):
    config = load_config("tiny", [f"output={tmp_path}"])
    run = launcher.job.prepare_run(config)
    (run / "checkpoints").mkdir()
    (run / CONFIG_FILE).write_text("model: {vocab")
    launcher.job.prepare_run(config)
    assert f"{run / CONFIG_FILE}: not valid YAML" in capsys.readouterr().err
    assert load_config(str(run / CONFIG_FILE)) == config
