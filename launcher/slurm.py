"""SLURM, as a user speaks to it: what there is, submitting a script, what became of a job, following it to its end."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from fusiontree.errors import RunError, UserError
from fusiontree.files import write_atomic
from launcher.job import Plan

SUBMITTED = "job.id"  # in the run's folder, beside the script: what sbatch answered
# a task's place among the ranks in torch's words, which it takes first
PLACE = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
_POLL = 1.0  # seconds between two looks at a job that is followed
LIVING = (
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
    """Raise UserError if there is no SLURM here or it has no such partition."""
    missing = next((name for name in ("sbatch", "sinfo", "scontrol") if shutil.which(name) is None), None)
    if missing:
        raise UserError(
            f"--slurm: no {missing} on PATH; launch from a node of the cluster, or use --local or --hostfile"
        )
    if partition is None:
        return
    partitions = set(_ask("sinfo", "--noheader", "--format=%R").split())
    for name in partition.split(","):
        if name not in partitions:
            raise UserError(f"--partition {name}: no such partition; there are {', '.join(sorted(partitions))}")


def default_limit(partition: str | None) -> str | None:
    """The limit, as sbatch takes it, of jobs in `partition` (None: the default one) that name none; None: endless."""
    shown = _ask("sinfo", "--noheader", "--format=%P %L %l", *([f"--partition={partition}"] if partition else []))
    lines = [line.split() for line in shown.splitlines()]
    own = next((line for line in lines if partition or line[0].endswith("*")), None)
    limits = [limit for limit in (own or [])[1:] if limit[0].isdecimal()]
    return limits[0] if limits else None


def submit(script: Path) -> str:
    """Submit `script` and return the job's id; what SLURM would never run is refused first.

    Raises:
        UserError: SLURM does not take it; the message is SLURM's own.
    """
    for options in (["--test-only"], ["--parsable"]):
        done = subprocess.run(["sbatch", *options, str(script)], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "sbatch failed")
            raise UserError(f"SLURM refuses {script}: {reason.removeprefix('allocation failure: ')}")
    job_id = done.stdout.strip().split(";")[0]
    write_atomic(script.with_name(SUBMITTED), job_id + "\n")
    return job_id


def this_job() -> str:
    """The job around this process, as SLURM's commands take it; of an array one task alone, as ARRAY_TASK.

    Its own id will not do: that of the last task stands for the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def hostnames(nodelist: str) -> list[str]:
    """The nodes of an allocation, from SLURM's short form of them."""
    return _ask("scontrol", "show", "hostnames", nodelist).split()


def command(plan: Plan) -> list[str]:
    """The srun command that runs `plan` inside an allocation; MASTER_ADDR and MASTER_PORT come from the environment."""
    ranks = plan.ranks_per_node
    srun = ["srun", f"--nodes={plan.nodes}", f"--ntasks={plan.nodes * ranks}", f"--ntasks-per-node={ranks}"]
    return [
        *srun,
        "--kill-on-bad-exit=1",
        "bash",
        "-c",
        f'{PLACE}; exec "$@"',
        "rank",
        sys.executable,
        "-m",
        *plan.program,
    ]


def submitted(run: Path) -> str | None:
    """The id of the job that `submit` last made for `run`; None if it never did."""
    path = run / SUBMITTED
    return path.read_text().strip() if path.exists() else None


def _ask(*command: str) -> str:
    """The answer of one of SLURM's commands."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{command[0]} failed: {' '.join(done.stderr.split()) or f'code {done.returncode}'}")
    return done.stdout


def tasks(job_id: str) -> list[dict[str, str]]:
    """What SLURM knows of a job, or of each task of an array, by SLURM's own names; empty if it has forgotten it."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line.strip()]


def follow(job_id: str, logs: Path, out: TextIO) -> int:
    """Copy the job's output to `out` as it comes, over any number of requeues; the job's exit code in the end.

    Args:
        logs: the folder with ``slurm-JOB*.log`` and, of each start, ``JOB-N/rank-0.out``.

    Raises:
        RunError: the job was cancelled, or SLURM ended it.
    """
    positions: dict[Path, int] = {}
    while True:
        known = tasks(job_id)
        ours = (f"slurm-{job_id}.log", f"slurm-{job_id}_*.log", f"{job_id}-*/rank-0.out", f"{job_id}-*/node-0.out")
        for pattern in ours:
            for path in sorted(logs.glob(pattern)):
                positions[path] = _copy(path, positions.get(path, 0), out)
        if not any(task.get("JobState") in LIVING for task in known):
            return max(_exit_code(job_id, task) for task in known or [{}])
        time.sleep(_POLL)


def _copy(path: Path, position: int, out: TextIO) -> int:
    """Copy what `path` holds beyond `position`; the new position."""
    with open(path, errors="replace") as stream:
        stream.seek(position)
        shutil.copyfileobj(stream, out)
        out.flush()
        return stream.tell()


def _exit_code(job_id: str, task: dict[str, str]) -> int:
    code, _, signal = task.get("ExitCode", "1:0").partition(":")
    if task.get("JobState") in ("COMPLETED", "FAILED") and signal == "0":
        return int(code)
    reason = task.get("JobState", "forgotten by SLURM").lower().replace("_", " ")
    raise RunError(f"job {job_id} ended: {reason}; started again, the run goes on from its newest checkpoint")
