"""A job for SLURM: one sbatch script that can be read and kept, its submission, and following it to its end.

The script starts every rank by srun, so that no node needs ssh to another, and sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT itself. What must be decided inside the allocation is in `launcher.allocation`.
"""

import base64
import itertools
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TextIO

from fusiontree.config import RunConfig
from fusiontree.errors import RunError, UserError
from fusiontree.files import write_atomic
from fusiontree.memory import checkpoint_bytes
from launcher.plan import Plan

SCRIPT = "job.sbatch"  # in the run's folder
SUBMITTED = "job.id"  # beside it: what sbatch answered
_POLL = 1.0  # seconds between two looks at a job that is followed
_DISK_RATE = 0.5e9  # bytes/s that one node is taken to write of a checkpoint, at least
_MARGIN = 60  # seconds for the step that is under way when a job is asked to save
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


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for besides nodes and ranks."""

    gpus_per_node: int | None = None
    min_nodes: int | None = None  # fewer nodes than this are not worth a start; None: all of the plan's
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None  # limit, as sbatch takes it; None: the partition's
    constraint: str | None = None
    cpus_per_task: int | None = None
    extra: tuple[str, ...] = ()  # further #SBATCH lines, e.g. "exclusive" or "--mem=0"
    container: str | None = None  # *.sif: apptainer; anything else: pyxis
    container_mounts: str | None = None  # SOURCE:TARGET[,...]
    tasks: str = "rank"  # a task is a "rank", or a "node" whose ranks DeepSpeed's launcher starts
    save_ahead: int = _MARGIN  # seconds before the time limit at which the ranks are asked to save and leave


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some values, as the tasks of one job array."""

    runs: tuple[tuple[str, ...], ...]  # overrides of each, its name among them

    @classmethod
    def of(cls, name: str, axes: Sequence[str]) -> "Sweep":
        """The product of `axes`, each ``key=v1,v2,...``; every run is called after `name` and its values.

        Raises:
            UserError: an axis without values, or two runs of one name.
        """
        if not axes:
            return cls(((),))
        choices = []
        for axis in axes:
            key, equals, values = axis.partition("=")
            if not equals or not key or not all(values.split(",")):
                raise UserError(f"--sweep '{axis}' is not of the form key=v1,v2, e.g. optimizer.lr=1e-3,3e-4")
            choices.append([(key, value) for value in values.split(",")])
        runs = [
            (*(f"{k}={v}" for k, v in pairs), f"name={_run_name(name, pairs)}") for pairs in itertools.product(*choices)
        ]
        if len({run[-1] for run in runs}) < len(runs):
            raise UserError(f"--sweep {' --sweep '.join(axes)}: a value is given twice; each run needs its own")
        return cls(tuple(runs))


def _run_name(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._-]", "_", key.rpartition(".")[2] + value) for key, value in pairs)])


# what a task does first: its place among the ranks, in torch's words
_PLACE = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'


# --- the script ------------------------------------------------------------------------------------------------------


class _Template(string.Template):
    delimiter = "@"  # the shell has the dollar


def render(plan: Plan, job: Job, runs: Sequence[Path], folder: Path) -> str:
    """The sbatch script.

    Args:
        runs: whole paths of the runs' folders; more than one makes a job array.
        folder: whole path of the folder for SLURM's own output.
    """
    text = (files("launcher") / "job.sbatch").read_text(encoding="utf-8")
    ranks, least = plan.ranks_per_node, job.min_nodes or plan.nodes
    variables = [f"export {key}={shlex.quote(value)}" for key, value in plan.environment.items()]
    return _Template(text).substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(plan, job, len(runs), folder)),
        title=f"{folder.parent.name}: {plan.nodes} nodes of {ranks} ranks",
        folder=shlex.quote(os.getcwd()),
        environment="\n".join([*plan.setup, *variables, ""]),
        run=_runs(runs),
        python=shlex.quote(sys.executable),
        limits=f"--ranks-per-node {ranks} --nodes {least}-{plan.nodes}",
        srun=" \\\n    ".join(_srun(plan, job)) + " \\",
        program=_program(plan, job, runs[0]),
    )


def _directives(plan: Plan, job: Job, runs: int, folder: Path) -> list[str]:
    least = job.min_nodes or plan.nodes
    options = {
        "job-name": folder.parent.name,
        "array": f"0-{runs - 1}" if runs > 1 else None,
        "nodes": f"{least}-{plan.nodes}" if least < plan.nodes else plan.nodes,
        "ntasks-per-node": plan.ranks_per_node if job.tasks == "rank" else 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time,
        "constraint": job.constraint,
        "signal": f"USR1@{job.save_ahead}",
        "output": folder / ("slurm-%A_%a.log" if runs > 1 else "slurm-%j.log"),
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    extra = [line if line.startswith("-") else f"--{line}" for line in job.extra]
    return [*lines, "--open-mode=append", "--requeue", *extra]


def _runs(runs: Sequence[Path]) -> str:
    """The line that names the run's folder, or in a job array a table of them."""
    if len(runs) == 1:
        return f"run={shlex.quote(str(runs[0]))}\n"
    cases = [f"    {number}) run={shlex.quote(str(run))} ;;" for number, run in enumerate(runs)]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", ""])


def _srun(plan: Plan, job: Job) -> list[str]:
    """The lines of the srun command before its program; a rank that fails takes the others with it."""
    tasks = plan.ranks_per_node if job.tasks == "rank" else 1
    total = f"$((nodes * {tasks}))" if tasks > 1 else '"$nodes"'
    cores = f" --cpus-per-task={job.cpus_per_task}" if job.cpus_per_task else ""  # srun forgets what sbatch was told
    lines = [
        f'srun --nodes="$nodes" --ntasks={total} --ntasks-per-node={tasks}{cores}',
        f'--kill-on-bad-exit=1 --output="$logs/{job.tasks}-%t.out"',
    ]
    if job.container and not job.container.endswith(".sif"):
        here = os.getcwd()
        mounts = ",".join([f"{here}:{here}", *([job.container_mounts] if job.container_mounts else [])])
        image = f"--container-image={shlex.quote(job.container)} --container-mounts={shlex.quote(mounts)}"
        lines.append(f"{image} --container-workdir={shlex.quote(here)}")
    return lines


def _program(plan: Plan, job: Job, run: Path) -> str:
    """What every task runs: the rank, its place set, or DeepSpeed's launcher of one node's ranks."""
    module, *arguments = plan.program
    words = " ".join([module, *(_quoted(word, run) for word in arguments)])
    python, inside = "python" if job.container else shlex.quote(sys.executable), _apptainer(job)
    # the signal that asks the ranks to save goes to every process of a task and would end the one around them
    ignoring = 'trap "" USR1; ' if job.tasks == "node" or inside else ""
    if job.tasks == "rank":
        script = ignoring + _PLACE
        return f"bash -c {shlex.quote(script)} rank \\\n    {inside}{python} -m {words}"
    launch = '"$0" -m deepspeed.launcher.launch --node_rank=$SLURM_PROCID --world_info=$WORLD_INFO'
    meeting = "--master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    script = f'{ignoring}exec {inside}{launch} {meeting} --no_local_rank --module "$@"'
    return f"bash -c {shlex.quote(script)} {python} \\\n    {words}"


def _quoted(word: str, run: Path) -> str:
    """`word` for the shell, the run's folder as the variable that the script has set."""
    start = str(run)
    return f'"$run"{shlex.quote(word[len(start) :])}' if word.startswith(start) else shlex.quote(word)


def _apptainer(job: Job) -> str:
    if not job.container or not job.container.endswith(".sif"):
        return ""
    mounts = f" --bind {shlex.quote(job.container_mounts)}" if job.container_mounts else ""
    gpus = " --nv" if job.gpus_per_node else ""
    return f"apptainer exec{gpus} --bind {shlex.quote(os.getcwd())}{mounts} {shlex.quote(job.container)} "


def world_info(nodes: Sequence[str], ranks_per_node: int) -> str:
    """What DeepSpeed's node launcher reads: the ranks' devices by node, as it encodes them."""
    return base64.urlsafe_b64encode(json.dumps({node: list(range(ranks_per_node)) for node in nodes}).encode()).decode()


# --- before anything is submitted ------------------------------------------------------------------------------------


def save_ahead(config: RunConfig, nodes: int) -> int:
    """Seconds that the step under way and one checkpoint take at most: its bytes at 0.5 GB/s a node."""
    return _MARGIN + round(checkpoint_bytes(config) / (_DISK_RATE * nodes))


def check(job: Job, nodes: int) -> None:
    """Raise UserError for what is wrong in itself: more nodes at least than at most, a limit that a save takes up."""
    if job.min_nodes is not None and not 1 <= job.min_nodes <= nodes:
        raise UserError(f"--min-nodes {job.min_nodes} of --nodes {nodes}: give at least 1 and at most as many")
    if job.time is None:
        return
    limit = seconds(job.time)
    if limit <= job.save_ahead:
        raise UserError(
            f"--time {job.time} is {limit:,} s, and the ranks are asked to save {job.save_ahead:,} s before its end, "
            "which a checkpoint may take: nothing would be trained; raise --time, or lower --save-ahead"
        )


def seconds(limit: str) -> int:
    """Seconds of a time limit in any of sbatch's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    fields = rest.split(":")
    if not all(field.isdecimal() for field in [*fields, *([days] if dash else [])]) or len(fields) > 3:
        raise UserError(f"--time {limit}: give minutes, minutes:seconds, hours:minutes:seconds or days-hours")
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))


def check_cluster(job: Job) -> None:
    """Raise UserError if there is no SLURM here or it has no such partition."""
    missing = next((name for name in ("sbatch", "sinfo", "scontrol") if shutil.which(name) is None), None)
    if missing:
        raise UserError(
            f"--slurm: no {missing} on PATH; launch from a node of the cluster, or use --local or --hostfile"
        )
    if job.partition is None:
        return
    partitions = set(_ask("sinfo", "--noheader", "--format=%R").split())
    for name in job.partition.split(","):
        if name not in partitions:
            raise UserError(f"--partition {name}: no such partition; there are {', '.join(sorted(partitions))}")


def write(text: str, folder: Path) -> Path:
    """Write the script into the run's folder, and make the folder of its logs; the script's path."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SCRIPT, text)
    return folder / SCRIPT


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


def hostnames(nodelist: str) -> list[str]:
    """The nodes of an allocation, from SLURM's short form of them."""
    return _ask("scontrol", "show", "hostnames", nodelist).split()


def command(plan: Plan) -> list[str]:
    """The srun command that runs `plan` inside an allocation; MASTER_ADDR and MASTER_PORT come from the environment."""
    ranks = plan.ranks_per_node
    srun = ["srun", f"--nodes={plan.nodes}", f"--ntasks={plan.nodes * ranks}", f"--ntasks-per-node={ranks}"]
    return [*srun, "--kill-on-bad-exit=1", "bash", "-c", _PLACE, "rank", sys.executable, "-m", *plan.program]


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


# --- while it runs ---------------------------------------------------------------------------------------------------


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
        for pattern in (f"slurm-{job_id}*.log", f"{job_id}-*/rank-0.out", f"{job_id}-*/node-0.out"):
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
