"""A job on the hosts of a hostfile, started over ssh by pdsh or Open MPI.

pdsh starts DeepSpeed's node launcher on every host, which starts the host's ranks; Open MPI starts the ranks itself.
Both run one script from the launch folder, so that no variable, path or argument of the ranks passes through a command
line that pdsh, ssh or a remote shell interprets. (DeepSpeed's multinode runner would write them there unquoted.)

At a stop the ssh clients end and the remote processes do not, so the ranks watch a heartbeat (`launcher.heartbeat`).
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusiontree.console import console
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.errors import StoppedError, UserError, from_exit_code
from fusiontree.files import write_atomic
from fusiontree.run.folder import LOGS
from launcher import heartbeat, local, quoting, rank_reports
from launcher.job import Plan, network_settings, world_info
from launcher.join import GRACE

# files in the launch folder
_SCRIPT = "start.sh"  # starts a host's ranks (pdsh) or one rank (Open MPI)
_HOSTS = "hostfile"  # Open MPI's
_FANOUT = "1024"  # hosts that pdsh connects to at once
_SAVE_TIMEOUT = 600.0  # seconds that ranks have to save and exit before pdsh or mpirun is killed
# the ranks notice a stop request up to one interval late
_FAILURE_GRACE = local.FAILURE_GRACE - heartbeat.INTERVAL
# never ask for a password; give up on a host that has not answered for 60 s
_SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
# exits with 94 if the port is in use
_PORT_CHECK = "import socket, sys\ntry: socket.socket().bind(('', int(sys.argv[1])))\nexcept OSError: sys.exit(94)"
# torch's variables from Open MPI's
_RANK_EXPORTS = (
    "export RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE"
)
_FORWARDED_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")


# --- the command -----------------------------------------------------------------------------------------------------


def render(plan: Plan, launcher: str, folder: Path) -> list[str]:
    """Return the command that starts `plan`; it reads the files of `launch_files` from `folder`.

    Raises:
        UserError: a selection of slots that Open MPI cannot express.
    """
    script = str(folder / _SCRIPT)
    if launcher == "openmpi":
        _check_first_slots(plan)
        ranks, hosts = str(plan.world_size), str(folder / _HOSTS)
        return ["mpirun", "-n", ranks, "-hostfile", hosts, "--bind-to", "none", "bash", script]
    # pdsh replaces %n by the host's rank, and with -S exits with the largest code of the hosts
    command = f"{quoting.pdsh_command('bash', script)} %n"
    return ["pdsh", "-R", "ssh", "-S", "-f", _FANOUT, "-w", ",".join(plan.hosts), command]


def _check_first_slots(plan: Plan) -> None:
    partial = next((host for host, slots in plan.hosts.items() if slots != tuple(range(len(slots)))), None)
    if partial:
        raise UserError(f"--launcher openmpi takes the first slots of a host; include or exclude all of {partial}")


def launch_files(plan: Plan, launcher: str, folder: Path) -> dict[str, str]:
    """Return name and content of the files that the command reads.

    Raises:
        UserError: the path of `folder` contains a control character.
    """
    quoting.check_one_line("the run's folder", folder)
    rendezvous = {"MASTER_ADDR": plan.master_address, "MASTER_PORT": str(plan.master_port)}
    environment = {**plan.environment, **rendezvous, LAUNCH_FOLDER: str(folder)}
    script = [*_exports(_forwarded_paths()), f"cd {shlex.quote(os.getcwd())} || exit", *plan.setup]
    script += [*_exports(environment)]
    if launcher == "openmpi":
        script += [_RANK_EXPORTS, f"exec {shlex.join([sys.executable, '-m', *plan.program])}", ""]
        hosts = "".join(f"{host} slots={len(slots)}\n" for host, slots in plan.hosts.items())
        return {_SCRIPT: "\n".join(script), _HOSTS: hosts}
    return {_SCRIPT: "\n".join([*script, _node_launcher(plan), ""])}


def _exports(environment: Mapping[str, str]) -> list[str]:
    return [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]


def _node_launcher(plan: Plan) -> str:
    """Return the line that starts DeepSpeed's launcher of a host's ranks; the script's argument is the host's rank."""
    words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world_info(plan.hosts)}"]
    words += [f"--master_addr={plan.master_address}", f"--master_port={plan.master_port}"]
    options = ["--log_level", "critical", "--no_local_rank", "--module"]
    return f'exec {shlex.join(words)} --node_rank="$1" {shlex.join([*options, *plan.program])}'


def _forwarded_paths() -> dict[str, str]:
    return {name: os.environ[name] for name in _FORWARDED_PATHS if name in os.environ}


def _launcher_environment() -> dict[str, str]:
    """Return the variables of pdsh and mpirun themselves."""
    ssh_options = {  # pdsh's and Open MPI's variables for extra ssh options
        name: f"{os.environ.get(name, '')} {' '.join(_SSH_OPTIONS)}".strip()
        for name in ("PDSH_SSH_ARGS_APPEND", "OMPI_MCA_plm_rsh_args")
    }
    # a rank that has saved exits with 75, which must not abort ranks that are still saving
    return {**ssh_options, "OMPI_MCA_orte_abort_on_non_zero_status": "0"}


def command_line(plan: Plan, launcher: str, run: Path) -> str:
    """Return the commands of `run` as lines to paste into a shell."""
    folder = _launch_folder(run)
    lines = [f"mkdir -p {shlex.quote(str(folder))}"]
    for name, content in launch_files(plan, launcher, folder).items():
        marks = (f"END{'_' * count}" for count in itertools.count())
        mark = next(mark for mark in marks if mark not in content.splitlines())
        lines.append(f"cat > {shlex.quote(str(folder / name))} <<'{mark}'\n{content}{mark}")
    words = [*(f"{key}={value}" for key, value in _launcher_environment().items()), *render(plan, launcher, folder)]
    return "\n".join([*lines, shlex.join(["env", *words])])


def _launch_folder(run: Path) -> Path:
    """Return the folder of a new launch: the files of `launch_files`, the ranks' reports, the heartbeat."""
    return run / LOGS / time.strftime(f"launch-%Y%m%d-%H%M%S-{os.getpid()}")


# --- the run ---------------------------------------------------------------------------------------------------------


def run(plan: Plan, run_dir: Path, launcher: str) -> int:
    """Run `plan` to its end and return its exit code: 0 if every rank succeeded, else the first failing rank's.

    SIGINT, SIGTERM and SIGUSR1 ask all ranks to save and exit.

    Args:
        run_dir: absolute path of a folder on a shared disk; the launch keeps its files under ``logs/`` there.

    Raises:
        UserError: a host cannot be reached or lacks a path; or the first failing rank reported a UserError.
        RunError: the first failing rank reported one, or a rank died without an exit report.
        KeyboardInterrupt: stopped by SIGINT.
    """
    folder = _launch_folder(run_dir)
    folder.mkdir(parents=True)
    command = render(plan, launcher, folder)
    for name, content in launch_files(plan, launcher, folder).items():
        write_atomic(folder / name, content)
    check_hosts(plan, folder)
    console.print(
        f"{plan.world_size} ranks on {', '.join(plan.hosts)}, rendezvous at {plan.master_address}:{plan.master_port}"
    )
    for line in network_settings(plan.environment):
        console.print(line)
    with heartbeat.sending(folder, GRACE) as sender:
        returned, stopped_by = _supervise(command, {**os.environ, **_launcher_environment()}, folder, sender)
    if stopped_by is not None:
        _await_ranks(folder)
    return _exit_code(folder, plan.world_size, returned, stopped_by)


def check_programs(launcher: str) -> None:
    """Raise UserError if a program that `launcher` needs is not on PATH."""
    programs = ("ssh", "pdsh" if launcher == "pdsh" else "mpirun")
    missing = next((program for program in programs if shutil.which(program) is None), None)
    if missing:
        raise UserError(f"--hostfile: no {missing} on PATH; install it, or launch with --local or --slurm")


def check_hosts(plan: Plan, folder: Path) -> None:
    """Raise UserError unless ssh reaches every host and finds the current folder, `folder` and this Python there.

    The first host must also have the rendezvous port free.
    """
    python, here = shlex.quote(sys.executable), shlex.quote(os.getcwd())
    paths = f"test -d {here} || exit 91; test -d {shlex.quote(str(folder))} || exit 92; test -x {python} || exit 93"
    checks = dict.fromkeys(plan.hosts, paths)
    checks[plan.master_address] += f"; {python} -c {shlex.quote(_PORT_CHECK)} {plan.master_port}"
    with ThreadPoolExecutor(32) as pool:
        results = dict(zip(checks, pool.map(_ssh, checks.items()), strict=True))
    reasons = {
        91: f"has no folder {os.getcwd()}; launch from a folder on a shared disk",
        92: f"does not see {folder}; put the run's output on a shared disk",
        93: f"has no {sys.executable}; install this Python environment at the same path on every host",
        94: f"has port {plan.master_port} in use; launch again to get another port",
    }
    for host, result in results.items():
        if result.returncode:
            error = " ".join(result.stderr.split()) or f"ssh exited with code {result.returncode}"
            raise UserError(f"host {host} {reasons.get(result.returncode, f'cannot be used: {error}')}")


def _ssh(host_and_check: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    host, check = host_and_check
    command = ["ssh", *_SSH_OPTIONS, "-o", "ConnectTimeout=10", host, check]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _supervise(
    command: list[str], environment: dict[str, str], folder: Path, sender: heartbeat.Heartbeat
) -> tuple[int, int | None]:
    """Run pdsh or mpirun to its end and return its exit code and the signal that asked for a stop."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=local.ignore_forwarded_signals,
    )
    failed = threading.Event()
    reader = threading.Thread(target=_relay_errors, args=(process.stderr, failed), name="launcher-errors", daemon=True)
    reader.start()
    stop: dict[str, Any] = {"signal": None, "deadline": float("inf")}

    def request_stop(number: int, frame: object) -> None:
        stop.update(signal=stop["signal"] or number, deadline=min(stop["deadline"], time.monotonic() + _SAVE_TIMEOUT))
        sender.request_stop(GRACE)

    with local.handling_signals(request_stop):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=local.POLL_INTERVAL), stop["signal"]
                if not failed.is_set() and any(report["code"] for report in rank_reports.read(folder)):
                    failed.set()
                if failed.is_set() and stop["deadline"] == float("inf"):
                    sender.request_stop(_FAILURE_GRACE)  # a save needs all ranks, so the others need no time for it
                    stop["deadline"] = time.monotonic() + 3 * _FAILURE_GRACE
                if time.monotonic() > stop["deadline"]:
                    local.signal_group(process.pid, signal.SIGKILL)
        finally:
            local.signal_group(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(timeout=1)  # the ssh clients of a killed pdsh keep the pipe open


def _relay_errors(lines: Iterable[str], failed: threading.Event) -> None:
    """Copy `lines` to standard error; on pdsh's line about a failed host, which pdsh does not act on, set `failed`."""
    for line in lines:
        if re.match(r"pdsh@\S+: \S+: ssh exited with exit code \d+$", line):
            failed.set()
        else:
            sys.stderr.write(line)


def _await_ranks(folder: Path) -> None:
    """Wait until every rank has reported, for `GRACE` seconds at most."""
    deadline = time.monotonic() + GRACE
    while rank_reports.unreported(folder) and time.monotonic() < deadline:
        time.sleep(local.POLL_INTERVAL)


def _exit_code(folder: Path, ranks: int, returned: int, stopped_by: int | None) -> int:
    """Return the exit code of the launch, or raise the error of the first rank that failed."""
    reports = rank_reports.read(folder)
    if len(reports) == ranks and not any(report["code"] for report in reports):
        return 0
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    failure = rank_reports.first_failure(folder)
    if failure is None and stopped_by is not None:
        raise StoppedError(f"stopped by {signal.Signals(stopped_by).name} before any rank started; start again")
    if failure is None:
        return returned or 1  # pdsh or Open MPI printed the reason
    raise from_exit_code(failure.code, failure.message)
