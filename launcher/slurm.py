"""SLURM's commands: checks of the cluster, submission, the queue's view of a job, following a job to its end."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from fusiontree.errors import RunError, UserError
from fusiontree.files import write_atomic
from fusiontree.run.state_files import DamagedError, read_line, read_or_none
from launcher.job import Plan

_JOB_ID_FILE = "job.id"  # in the folder of the script: the id that sbatch returned
JOB_ID = r"[0-9]{1,18}(_[0-9]{1,18})?"  # regular expression; of a task of an array, ARRAY_TASK
# torch's variables from SLURM's
RANK_EXPORTS = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
_POLL_INTERVAL = 1.0  # seconds between two polls of a job that is followed
ACTIVE_STATES = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "STOPPED",
)


def check_cluster(partition: str | None) -> None:
    """Raise UserError if SLURM's commands are not on PATH or the cluster has no such partition."""
    missing = next((name for name in ("sbatch", "sinfo", "scontrol") if shutil.which(name) is None), None)
    if missing:
        raise UserError(
            f"--slurm: no {missing} on PATH; launch from a node of the cluster, or use --local or --hostfile"
        )
    if partition is None:
        return
    partitions = set(_output("sinfo", "--noheader", "--format=%R").split())
    for name in partition.split(","):
        if name not in partitions:
            raise UserError(f"--partition {name} does not exist; choose from {', '.join(sorted(partitions))}")


def default_time_limit(partition: str | None) -> str | None:
    """Return the time limit, in sbatch's format, of jobs without one in `partition`; None if there is no limit.

    Args:
        partition: None: the cluster's default partition.
    """
    shown = _output("sinfo", "--noheader", "--format=%P %L %l", *([f"--partition={partition}"] if partition else []))
    lines = [line.split() for line in shown.splitlines()]
    row = next((line for line in lines if partition or line[0].endswith("*")), None)
    limits = [limit for limit in (row or [])[1:] if limit[0].isdecimal()]  # the default limit, else the maximum
    return limits[0] if limits else None


def submit(script: Path) -> str:
    """Submit `script` and return the job's id; a trial run catches jobs that SLURM could never start.

    Raises:
        UserError: SLURM rejects the script; the message includes SLURM's own.
    """
    for options in (["--test-only"], ["--parsable"]):
        done = subprocess.run(["sbatch", *options, str(script)], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "sbatch failed")
            raise UserError(f"SLURM rejects {script}: {reason.removeprefix('allocation failure: ')}")
    job_id = done.stdout.strip().split(";")[0]
    write_atomic(script.with_name(_JOB_ID_FILE), job_id + "\n")
    return job_id


def current_job_id() -> str:
    """Return the id of the job that this process runs in; for a task of an array, ARRAY_TASK.

    SLURM_JOB_ID would not do: the last task of an array shares its id with the array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def hostnames(nodelist: str) -> list[str]:
    """Expand SLURM's compressed node list of an allocation."""
    return _output("scontrol", "show", "hostnames", nodelist).split()


def srun_command(plan: Plan) -> list[str]:
    """Return the srun command that runs `plan` in an allocation; MASTER_ADDR and MASTER_PORT are in the environment."""
    ranks = plan.ranks_per_node
    srun = ["srun", f"--nodes={plan.nodes}", f"--ntasks={plan.nodes * ranks}", f"--ntasks-per-node={ranks}"]
    return [
        *srun,
        "--kill-on-bad-exit=1",
        "bash",
        "-c",
        f'{RANK_EXPORTS}; exec "$@"',
        "rank",
        sys.executable,
        "-m",
        *plan.program,
    ]


def submitted_job_id(run: Path) -> str | None:
    """Return the id of the last job that `submit` created for `run`, or None."""
    return read_or_none(run / _JOB_ID_FILE, _read_job_id, "the run's job is unknown")


def _read_job_id(path: Path) -> str:
    job_id = read_line(path)
    if not re.fullmatch(JOB_ID, job_id):
        raise DamagedError("it is not a job's id")
    return job_id


def _output(*command: str) -> str:
    """Run one of SLURM's commands and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{command[0]} failed: {' '.join(done.stderr.split()) or f'code {done.returncode}'}")
    return done.stdout


def query_tasks(job_id: str) -> list[dict[str, str]]:
    """Return SLURM's record of a job, or of each task of an array; empty if SLURM no longer has one."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line.strip()]


def follow(job_id: str, logs: Path, out: TextIO) -> int:
    """Copy the job's output to `out` until the job ends, across requeues, and return the job's exit code.

    Args:
        logs: the folder with ``slurm-JOB*.log`` and, for attempt N, ``JOB-N/rank-0.out``.

    Raises:
        RunError: the job was cancelled, or SLURM ended it.
    """
    positions: dict[Path, int] = {}
    while True:
        tasks = query_tasks(job_id)
        patterns = (f"slurm-{job_id}.log", f"slurm-{job_id}_*.log", f"{job_id}-*/rank-0.out", f"{job_id}-*/node-0.out")
        for pattern in patterns:
            for path in sorted(logs.glob(pattern)):
                positions[path] = _copy(path, positions.get(path, 0), out)
        if not any(task.get("JobState") in ACTIVE_STATES for task in tasks):
            return max(_exit_code(job_id, task) for task in tasks or [{}])
        time.sleep(_POLL_INTERVAL)


def _copy(path: Path, position: int, out: TextIO) -> int:
    """Copy `path` from `position` on and return the new position."""
    with open(path, errors="replace") as stream:
        stream.seek(position)
        shutil.copyfileobj(stream, out)
        out.flush()
        return stream.tell()


def _exit_code(job_id: str, task: dict[str, str]) -> int:
    code, _, signal = task.get("ExitCode", "1:0").partition(":")
    if task.get("JobState") in ("COMPLETED", "FAILED") and signal == "0":
        return int(code)
    reason = task.get("JobState", "no longer known to SLURM").lower().replace("_", " ")
    raise RunError(f"job {job_id} ended: {reason}; submit it again to resume from the newest checkpoint")
