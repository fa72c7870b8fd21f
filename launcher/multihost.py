"""A job on the hosts of a hostfile, through DeepSpeed's own launchers: pdsh over ssh, or Open MPI.

What they leave out is done here. They hand on few variables, so all go through a file: DeepSpeed's own for pdsh, a
script around the rank for Open MPI. They end their ssh clients, not what these have started on the hosts, so a beat
does (`launcher.heartbeat`).
"""

import contextlib
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
from fusiontree.errors import UserError, from_exit_code
from fusiontree.run.folder import LOGS
from launcher import heartbeat, local, rank_reports
from launcher.job import Plan, network_settings
from launcher.join import GRACE

_ENVIRONMENT = "environment"  # in the folder of a launch: DeepSpeed's environment file
_SETUP = "setup.sh"
_RANK = "rank.sh"  # what Open MPI starts
_HOSTS = "hostfile"
_SAVING = 600.0  # seconds that ranks may take to save and leave before what is left of the launch is killed
_LINGER = local.ENDING - heartbeat.INTERVAL  # seconds that ranks have when another has failed and they have heard of it
# ssh gives a host up that has been silent for a minute, and never asks for a password
_SSH = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
# exits with 94 where something listens on the port
_FREE = "import socket, sys\ntry: socket.socket().bind(('', int(sys.argv[1])))\nexcept OSError: sys.exit(94)"
# a rank's place in torch's words, from Open MPI's
_PLACE = "export RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE"
_CARRIED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX")  # so that a host finds what is found here


# --- the command -----------------------------------------------------------------------------------------------------


def render(plan: Plan, launcher: str, folder: Path) -> list[str]:
    """The command that starts `plan` through DeepSpeed; the files it reads are those of `launch_files` in `folder`.

    Raises:
        UserError: Open MPI cannot do what is asked for.
    """
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / _HOSTS), "--force_multi"]
    meeting = ["--master_addr", plan.master_address, "--master_port", str(plan.master_port), "--no_ssh_check"]
    common = [*runner, *meeting, "--log_level", "critical", "--launcher", launcher]
    if launcher == "openmpi":
        _check_whole_hosts(plan)
        return [*common, "--no_python", "bash", str(folder / _RANK)]
    slots = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in plan.hosts.items())
    setup = ["--venv_script", str(folder / _SETUP)] if plan.setup else []
    return [*common, "--include", slots, *setup, "--no_local_rank", "--module", *plan.program]


def _check_whole_hosts(plan: Plan) -> None:
    odd = next((host for host, slots in plan.hosts.items() if slots != tuple(range(len(slots)))), None)
    if odd:
        raise UserError(f"--launcher openmpi takes the first slots of a host; include or exclude the whole of {odd}")


def launch_files(plan: Plan, launcher: str, folder: Path) -> dict[str, str]:
    """Name and content of the files that the command reads.

    Raises:
        UserError: a variable that DeepSpeed's environment file cannot hold.
    """
    environment = {**_carried(), **plan.environment, LAUNCH_FOLDER: str(folder)}
    files = {_HOSTS: "".join(f"{host} slots={max(slots) + 1}\n" for host, slots in plan.hosts.items())}
    if launcher == "openmpi":
        return files | {_RANK: _rank_script(plan, environment)}
    files[_ENVIRONMENT] = "".join(f"{key}={_quoted(key, environment[key])}\n" for key in environment)
    return files | ({_SETUP: "\n".join([*plan.setup, ""])} if plan.setup else {})


def _rank_script(plan: Plan, environment: Mapping[str, str]) -> str:
    """What a rank of Open MPI is: through DeepSpeed's environment file, values would arrive in quotes."""
    meeting = {"MASTER_ADDR": plan.master_address, "MASTER_PORT": str(plan.master_port)}
    exports = [f"export {key}={shlex.quote(value)}" for key, value in {**environment, **meeting}.items()]
    return "\n".join([*exports, _PLACE, *plan.setup, f"exec {shlex.join([sys.executable, '-m', *plan.program])}", ""])


def _carried() -> dict[str, str]:
    return {name: os.environ[name] for name in _CARRIED if name in os.environ}


def _quoted(key: str, value: str) -> str:
    """`value` as it must stand in the file: DeepSpeed puts it into double quotes in a command for a shell."""
    if "\n" in value:
        raise UserError(f"variable {key} has more than one line, which ssh does not hand on; leave it out")
    return re.sub(r'(["\\$`])', r"\\\1", value)


def _runner_environment(folder: Path) -> dict[str, str]:
    appended = {  # each launcher's own name for further arguments of ssh
        name: f"{os.environ.get(name, '')} {' '.join(_SSH)}".strip()
        for name in ("PDSH_SSH_ARGS_APPEND", "OMPI_MCA_plm_rsh_args")
    }
    # ranks that have saved and leave say so by their exit codes, each in its own time
    patient = {"OMPI_MCA_orte_abort_on_non_zero_status": "0"}
    return {"DS_ENV_FILE": str(folder / _ENVIRONMENT), **appended, **patient}


def command_line(plan: Plan, launcher: str, run: Path) -> str:
    """What `run` would start, as lines to paste into a shell."""
    folder = _folder(run)
    lines = [f"mkdir -p {shlex.quote(str(folder))}"]
    for name, content in launch_files(plan, launcher, folder).items():
        lines.append(f"cat > {shlex.quote(str(folder / name))} <<'END'\n{content}END")
    words = [*(f"{key}={value}" for key, value in _runner_environment(folder).items()), *render(plan, launcher, folder)]
    return "\n".join([*lines, shlex.join(["env", *words])])


def _folder(run: Path) -> Path:
    """A new launch's folder, which all hosts share: the files of `launch_files`, the ranks' reports, the beat."""
    return run / LOGS / time.strftime(f"launch-%Y%m%d-%H%M%S-{os.getpid()}")


# --- the run ---------------------------------------------------------------------------------------------------------


def run(plan: Plan, run_dir: Path, launcher: str) -> int:
    """Run `plan` to its end and return its exit code: 0 when every rank ended well, else the first failing rank's.

    SIGINT, SIGTERM and SIGUSR1 ask all ranks to save and leave.

    Args:
        run_dir: whole path of a folder that all hosts share; the launch keeps its files under ``logs/`` there.

    Raises:
        UserError: a host cannot be reached or does not see what is here; or what the first failing rank said.
        RunError: what the first failing rank said, or that a rank died without a word.
        KeyboardInterrupt: stopped by SIGINT.
    """
    folder = _folder(run_dir)
    folder.mkdir(parents=True)
    command = render(plan, launcher, folder)
    for name, content in launch_files(plan, launcher, folder).items():
        (folder / name).write_text(content)
    check_hosts(plan, folder)
    console.print(
        f"{plan.world_size} ranks on {', '.join(plan.hosts)}, meeting at {plan.master_address}:{plan.master_port}"
    )
    for line in network_settings(plan.environment):
        console.print(line)
    with heartbeat.kept(folder, GRACE) as heart:
        returned, stopped_by = _supervise(command, {**os.environ, **_runner_environment(folder)}, folder, heart)
    if stopped_by is not None:
        _await_ranks(folder)
    return _verdict(folder, plan.world_size, returned, stopped_by)


def check_programs(launcher: str) -> None:
    """Raise UserError if what `launcher` needs is not here."""
    programs = ("ssh", "pdsh" if launcher == "pdsh" else "mpirun")
    missing = next((program for program in programs if shutil.which(program) is None), None)
    if missing:
        raise UserError(f"--hostfile: no {missing} on PATH; install it, or launch with --local or --slurm")


def check_hosts(plan: Plan, folder: Path) -> None:
    """Raise UserError unless every host can be reached and sees this folder and this Python where they are here."""
    python, here = shlex.quote(sys.executable), shlex.quote(os.getcwd())
    probe = f"test -d {here} || exit 91; test -d {shlex.quote(str(folder))} || exit 92; test -x {python} || exit 93"
    probes = dict.fromkeys(plan.hosts, probe)
    probes[plan.master_address] += f"; {python} -c {shlex.quote(_FREE)} {plan.master_port}"
    with ThreadPoolExecutor(32) as pool:
        done = dict(zip(probes, pool.map(_ssh, probes.items()), strict=True))
    reasons = {
        91: f"has no folder {os.getcwd()}",
        92: f"does not see {folder}; put the run's output on a shared disk",
        93: f"has no {sys.executable}",
        94: f"has something else listening on port {plan.master_port}; start again",
    }
    for host, result in done.items():
        if result.returncode:
            said = " ".join(result.stderr.split()) or f"ssh ended with code {result.returncode}"
            raise UserError(f"host {host} {reasons.get(result.returncode, f'cannot be used: {said}')}")


def _ssh(host_and_probe: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    host, probe = host_and_probe
    command = ["ssh", *_SSH, "-o", "ConnectTimeout=10", host, probe]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _supervise(
    command: list[str], environment: dict[str, str], folder: Path, heart: heartbeat.Beat
) -> tuple[int, int | None]:
    """Run DeepSpeed's launcher to its end; its return code and the signal that asked for a stop."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=local.leave_signals_to_the_ranks,
    )
    failed = threading.Event()
    reader = threading.Thread(target=_pass_on, args=(process.stderr, failed), name="launcher-errors", daemon=True)
    reader.start()
    asked: dict[str, Any] = {"signal": None, "deadline": float("inf")}

    def stop(number: int, frame: object) -> None:
        asked.update(signal=asked["signal"] or number, deadline=min(asked["deadline"], time.monotonic() + _SAVING))
        heart.stop(GRACE)

    with local.handling(stop):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=local.LOOK), asked["signal"]
                if not failed.is_set() and any(report["code"] for report in rank_reports.read(folder)):
                    failed.set()
                if failed.is_set() and asked["deadline"] == float("inf"):
                    heart.stop(_LINGER)  # nothing can be saved without the one that failed
                    asked["deadline"] = time.monotonic() + 3 * _LINGER
                if time.monotonic() > asked["deadline"]:
                    local.signal_group(process.pid, signal.SIGKILL)
        finally:
            local.signal_group(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(timeout=1)  # ssh clients of a killed pdsh keep its end of the pipe


def _pass_on(lines: Iterable[str], failed: threading.Event) -> None:
    """Print what pdsh and the ranks write; pdsh names a host that failed and goes on waiting for the others."""
    for line in lines:
        if re.match(r"pdsh@\S+: \S+: ssh exited with exit code \d+$", line):
            failed.set()
        else:
            sys.stderr.write(line)


def _await_ranks(folder: Path) -> None:
    """Give ranks that were asked to leave the time that they are given for it."""
    deadline = time.monotonic() + GRACE
    while rank_reports.silent(folder) and time.monotonic() < deadline:
        time.sleep(local.LOOK)


def _verdict(folder: Path, ranks: int, returned: int, stopped_by: int | None) -> int:
    """The exit code of the launch; raises what the first rank that failed has said."""
    said = rank_reports.read(folder)
    if len(said) == ranks and not any(report["code"] for report in said):
        return 0
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    failure = rank_reports.first_failure(folder)
    if failure is None:
        return returned or 1  # pdsh, Open MPI or DeepSpeed has written why
    raise from_exit_code(failure.code, failure.message)
