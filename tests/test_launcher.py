"""A local launch: checked before anything starts, run through DeepSpeed's real launcher, ended whole."""

import contextlib
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
from fusiontree.run.folder import CONFIG_FILE
from launcher import local
from launcher.job import Plan, plan_local, visible_gpus

# what each rank runs in place of training: rank N does the N-th of its arguments
RANK = """
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path
from fusiontree.distributed import outcome
from launcher.join import join_launcher

def save_and_leave(number, frame):
    with open(here / ("heard-" + os.environ["RANK"]), "a") as heard:
        heard.write(signal.Signals(number).name)
    time.sleep(2)
    outcome.report(75, None)
    sys.exit(75)

join_launcher()
here, todo = Path(sys.argv[1]), sys.argv[2 + int(os.environ["RANK"])]
(here / ("pid-" + os.environ["RANK"])).write_text(str(os.getpid()))
if todo == "stay":
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(120)
elif todo == "leave a child behind":
    child = subprocess.Popen(["sleep", "120"])
    (here / "pid-child").write_text(str(child.pid))
    outcome.report(0, None)
elif todo == "stay stubbornly":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(120)
elif todo == "save and leave":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save_and_leave)
    (here / ("listening-" + os.environ["RANK"])).touch()
    time.sleep(120)
elif todo == "be killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif todo == "kill DeepSpeed's launcher":
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(120)
elif todo == "end well, then abort":
    outcome.report(0, None)
    os.abort()
elif todo == "end well":
    outcome.report(0, None)
elif todo == "see the environment":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    (here / ("environment-" + os.environ["RANK"])).write_text(" ".join(os.environ[name] for name in names))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    outcome.report(0, None)
elif todo.startswith("fail: "):
    outcome.report(2, todo.removeprefix("fail: "))
    sys.exit(2)
elif todo.startswith("exit "):
    sys.exit(int(todo.removeprefix("exit ")))
"""

# what stands for `fusiontree launch` where a test sends it signals
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
    """Plans a job whose ranks do what they are told."""
    (tmp_path / "rank_stand_in.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def plan_job(*todo: str) -> Plan:
        return Plan(
            nodes=1,
            ranks_per_node=len(todo),
            program=("rank_stand_in", str(tmp_path), *todo),
            environment={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            master_address="127.0.0.1",
            master_port=free_port(),
        )

    return plan_job


@pytest.fixture
def started(job, tmp_path):
    """Starts a job in a process of its own and waits until its ranks run; kills what is left at the end."""
    processes = []

    def start(*todo: str, **environment: str) -> subprocess.Popen:
        fields = {name: getattr(job(*todo), name) for name in Plan.__dataclass_fields__}
        argv = [sys.executable, "-c", LAUNCH, json.dumps(fields)]
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment | {"TMPDIR": str(tmp_path)},
        )
        processes.append(process)
        expect(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in range(len(todo))))
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
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether process `pid` is there and not just waiting to be reaped."""
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
    """A machine with four cores and no GPU, whatever this one is."""
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "FUSIONTREE_LAUNCH", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(launcher.job, "visible_gpus", list)


def planned(dataset, ranks: int, *overrides: str) -> Plan:
    words = [f"data.path={dataset}", *overrides]
    return plan_local(load_config("tiny", words), "tiny", words, ranks)


def test_the_plan_shares_the_cores_and_names_the_accelerator(dataset):
    made = planned(dataset, 2, "seed=3")
    assert (made.nodes, made.ranks_per_node, made.world_size, made.devices) == (1, 2, 2, None)
    assert made.program == ("fusiontree", "train", "tiny", f"data.path={dataset}", "seed=3")
    assert made.environment == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
    assert 1024 < made.master_port < 65536
    assert planned(dataset, 4).environment["OMP_NUM_THREADS"] == "1"


def test_more_ranks_than_cores_get_a_thread_each(dataset):
    assert planned(dataset, 8, "batch.tokens=8192").environment["OMP_NUM_THREADS"] == "1"


def test_what_the_caller_has_set_wins(dataset, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert planned(dataset, 2).environment == {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (0, [], "--local 0: give the number of ranks"),
        (3, [], "does not divide among 3 ranks"),
        (2, ["data.path=nowhere"], "data.path nowhere: no manifest.json there"),
        (2, ["deepspeed=zero7"], "deepspeed 'zero7' is neither"),
        (2, ["model.vocab_size=100"], "8192 tokens, more than model.vocab_size 100"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(ranks, overrides, message, dataset, monkeypatch, capsys):
    monkeypatch.setattr(local.subprocess, "Popen", None)
    argv = ["launch", "tiny", "--local", str(ranks), f"data.path={dataset}", *overrides]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("allowed", ["losses.gate_balance.0", "losses.gate_balance"])
def test_the_folder_of_another_run_is_refused_unless_the_value_or_its_table_is_allowed(allowed, tmp_path):
    before, after = (load_config("tiny", [f"output={tmp_path}", f"losses.gate_balance={x}"]) for x in (0.1, 0.2))
    (launcher.job.prepare_run(before) / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"other values of losses\.gate_balance\.0;"):
        launcher.job.prepare_run(after)
    assert load_config(str(launcher.job.prepare_run(after, [allowed]) / CONFIG_FILE)) == after


@pytest.mark.parametrize(("chosen", "gpus"), [(None, ["2", "10"]), ("10", ["10"]), ("", []), ("-1", [])])
def test_gpus_are_the_devices_that_the_caller_left_visible(chosen, gpus, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia10"), Path("/dev/nvidia2")])
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == gpus


def test_gpus_are_one_a_rank(dataset, monkeypatch):
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["0", "1"])
    made = planned(dataset, 2)
    assert (made.environment["DS_ACCELERATOR"], made.devices) == ("cuda", None)
    with pytest.raises(UserError, match=r"--local 4 needs 4 GPUs, here are 2 \(0,1\)"):
        planned(dataset, 4)


def test_the_gpus_that_the_caller_chose_are_the_ones_used(dataset, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["3", "1"])
    assert planned(dataset, 2).devices == (3, 1)
    assert planned(dataset, 1).devices == (3,)
    monkeypatch.setattr(launcher.job, "visible_gpus", lambda: ["GPU-8f3a"])
    with pytest.raises(UserError, match="takes indices only"):
        planned(dataset, 1)


def test_the_dry_run_prints_a_line_to_paste(dataset, capsys):
    argv = ["launch", "tiny", "--dry-run", "--local", "2", f"data.path={dataset}", "name=a b"]
    assert cli.main(argv) == 2  # a name with a blank is no name
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
def test_the_ranks_of_every_target_are_told_what_a_resume_may_do(target, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1 slots=2\n")
    options = ["--trust-checkpoint", "--allow-changed", "seed", "--dry-run", f"data.path={dataset}"]
    assert cli.main(["launch", "tiny", *target.split(), *options]) == 0
    told = shlex.split(capsys.readouterr().out, comments=True)
    assert {"--trust-checkpoint", "--allow-changed=seed"} <= set(told)


def test_deepspeed_reads_the_devices_as_meant(job):
    from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

    made = job("end well", "end well")
    argv = local.render(Plan(**{**vars(made), "devices": (2, 3)}))
    args = parse_args(argv[3:])
    assert parse_inclusion_exclusion({"localhost": 4}, args.include, args.exclude) == {"localhost": [2, 3]}
    assert (args.num_gpus, args.num_nodes) == (-1, -1)
    assert (args.user_script, tuple(args.user_args)) == (made.program[0], made.program[1:])


# --- the run, through DeepSpeed's launcher ---------------------------------------------------------------------------


def test_ranks_find_their_place_the_plans_environment_and_signals_as_usual(job, tmp_path):
    made = job("see the environment", "see the environment")
    assert local.run(made) == 0
    seen = [(tmp_path / f"environment-{rank}").read_text() for rank in (0, 1)]
    assert seen == [f"{rank} {rank} 2 cpu 1 127.0.0.1 {made.master_port}" for rank in (0, 1)]


def test_a_users_mistake_comes_out_as_one_with_nothing_of_deepspeeds_own(job, capfd):
    with pytest.raises(UserError, match=r"^(rank \d: )?wrong input$") as caught:
        local.run(job("fail: wrong input", "fail: wrong input"))
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


def test_one_ranks_mistake_names_the_rank_and_ends_the_others(job, tmp_path):
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local.run(job("stay", "fail: wrong input"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_rank_killed_from_outside_is_a_failed_run_that_says_so(job, tmp_path):
    with pytest.raises(RunError, match=r"^rank 0 was killed by SIGKILL"):
        local.run(job("be killed", "stay"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_killed_deepspeed_launcher_is_a_failed_run_without_orphans(job, tmp_path):
    with pytest.raises(RunError, match="DeepSpeed's launcher was killed"):
        local.run(job("kill DeepSpeed's launcher", "stay"))
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_ranks_that_stay_when_one_has_failed_are_killed_soon_and_its_last_lines_shown(job, tmp_path, capsys):
    """DeepSpeed's launcher would give them half a minute; a rank that hangs in a kernel of the device needs it all."""
    (tmp_path / "rank-0.log").write_text("".join(f"line {number}\n" for number in range(30)))
    with pytest.raises(RunError, match=r"^rank 0 died without a word"):  # if DeepSpeed ended it: was killed by SIGKILL
        local.run(job("be killed", "stay stubbornly"), tmp_path)
    expect(lambda: not ranks_running(tmp_path), seconds=5)
    shown = capsys.readouterr().err
    assert shown.endswith("line 29\n")
    assert "line 20\n" in shown
    assert "line 19\n" not in shown


def test_when_a_rank_has_failed_the_others_end_within_ten_seconds(job, tmp_path, monkeypatch):
    left = []

    class Stop(local._Stop):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "deadline":
                left.append(value - time.monotonic())

    (tmp_path / "rank-0.json").write_text(json.dumps(said(0, 1, "wrong", 5)))
    monkeypatch.setattr(local, "_Stop", Stop)
    monkeypatch.setattr(local, "render", lambda plan: ["sleep", "1"])
    local._supervise(job("stay", "stay"), tmp_path)
    assert left[1] + 2 * local.LOOK < 10  # one look until it is noticed, one until the rest are killed


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
print(local._failed(folder))
"""


def test_a_rank_that_is_about_to_join_is_not_taken_for_dead(tmp_path):
    environment = os.environ | {outcome.LAUNCH_FOLDER: str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", JOIN, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["", str(tmp_path / "running-0"), "(False, None)"], done.stderr


def test_a_failure_that_follows_from_a_silent_death_is_not_taken_for_the_cause():
    reports = [said(0, 1, "another rank has ended", 5)]
    with pytest.raises(RunError, match=r"^rank 1 was killed by SIGKILL"):
        local._verdict(reports, 2, returned=256 - signal.SIGKILL, stopped_by=None, silent=1)
    with pytest.raises(RunError, match=r"^rank 1 died without a word"):
        local._verdict(reports, 2, returned=1, stopped_by=None, silent=1)


def test_a_rank_that_lost_another_and_said_so_first_is_not_taken_for_the_cause(monkeypatch, tmp_path):
    monkeypatch.setenv(outcome.LAUNCH_FOLDER, str(tmp_path))
    (tmp_path / "running-0").touch()
    outcome.report(1, LOST_PEER)
    assert local._failed(tmp_path) == (True, None)  # nobody else has failed
    (tmp_path / "running-1").touch()  # and nobody holds it
    assert local._failed(tmp_path) == (True, 1)
    with pytest.raises(RunError, match=r"^rank 1: wrong$"):
        local._verdict([said(0, 1, LOST_PEER, 5), said(1, 1, "wrong", 6)], 2, returned=1, stopped_by=None)


def test_nothing_that_a_rank_started_outlives_the_run(job, tmp_path):
    assert local.run(job("leave a child behind")) == 0
    assert (tmp_path / "pid-child").exists()
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_a_finished_run_stays_finished_though_a_rank_aborts_at_exit(job):
    assert local.run(job("end well, then abort", "end well")) == 0


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "RunError stopped by SIGTERM")],
)
def test_a_stop_reaches_every_rank(number, outcome, started, tmp_path):
    process = started("stay", "stay")
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert printed.startswith(outcome)
    assert errors == ""
    expect(lambda: not ranks_running(tmp_path), seconds=5)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(started, tmp_path):
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
def test_a_ranks_code_and_words_come_through(code, kind):
    with pytest.raises(kind, match=r"^words$") as caught:
        local._verdict([said(0, code, "words", 1), said(1, code, "words", 2)], 2, returned=1, stopped_by=signal.SIGTERM)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_may_save_and_leave_with_a_code_of_their_own(number, started, tmp_path):
    process = started("save and leave")
    expect((tmp_path / "listening-0").exists)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "code 75\n"
    # DeepSpeed's launcher has not heard of it: it would ask once more, and kill after half a minute
    assert (tmp_path / "heard-0").read_text() == number.name


def test_a_job_that_is_stopped_before_its_ranks_have_begun_ends_at_once(tmp_path):
    stop = local._Stop(tmp_path, ranks=2)
    (tmp_path / "rank-0.started").write_text(f"here {os.getpid()}")
    with local.handling(lambda *_: None):
        stop(signal.SIGUSR1, None)
    assert stop.signal == signal.SIGUSR1
    assert stop.deadline <= time.monotonic()


def test_ranks_end_with_the_process_that_launched_them(started, tmp_path):
    process = started("stay", "stay")
    assert len(ranks_running(tmp_path)) == 2
    process.kill()
    expect(lambda: not ranks_running(tmp_path))


# --- the verdict -----------------------------------------------------------------------------------------------------


def said(rank: int, code: int, message: str | None, when: int) -> dict:
    return {"rank": rank, "code": code, "message": message, "time": when}


def test_the_first_failure_in_time_decides():
    reports = [said(0, 1, "connection lost", 9), said(1, 2, "wrong input", 5)]
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local._verdict(reports, 2, returned=1, stopped_by=None)


def test_a_failure_that_all_ranks_share_names_none():
    reports = [said(0, 2, "wrong input", 9), said(1, 2, "wrong input", 5)]
    with pytest.raises(UserError, match=r"^wrong input$"):
        local._verdict(reports, 2, returned=2, stopped_by=None)
    with pytest.raises(UserError, match=r"^rank 1: wrong input$"):
        local._verdict(reports[1:], 2, returned=2, stopped_by=None)


def test_a_failure_that_was_shown_already_is_its_code_only():
    assert local._verdict([said(0, 1, None, 3)], 2, returned=1, stopped_by=None) == 1


@pytest.mark.parametrize("returned", [1, 2])
def test_a_rank_that_failed_before_it_could_report_gives_its_code(returned):
    assert local._verdict([], 2, returned, stopped_by=None) == returned


def test_success_needs_every_rank():
    with pytest.raises(RunError, match="launcher was killed"):
        local._verdict([said(0, 0, None, 3)], 2, returned=0, stopped_by=None)


def test_other_jobs_ranks_report_to_nobody(monkeypatch, tmp_path):
    assert outcome.report(1, "words") is False
    monkeypatch.setenv("FUSIONTREE_LAUNCH", str(tmp_path / "gone"))
    assert outcome.report(1, "words") is False
