"""The sbatch script of a job: one that can be read, kept and submitted again.

It starts every rank by srun, so that no node needs ssh to another, and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT itself. What must be decided inside the allocation is in `launcher.allocation`.
"""

import itertools
import os
import re
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fusiontree.config import RunConfig
from fusiontree.doctor.memory import checkpoint_bytes
from fusiontree.errors import UserError
from fusiontree.files import write_atomic
from fusiontree.run.folder import LOGS
from fusiontree.run.records import read_metrics
from launcher import slurm
from launcher.containers import Entry, entry
from launcher.job import Plan

SCRIPT = "job.sbatch"  # in the run's folder
_DISK_RATE = 0.5e9  # bytes/s that one node is taken to write of a checkpoint, as long as the run has written none
_MARGIN = 60  # seconds for the step that is under way when a job is asked to save, at least
_LOOKED_AT = 20  # of the newest saves and steps, the slowest


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
    container: str | None = None  # see `containers.entry`
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
    inside = entry(job.container, job.container_mounts, [one.parent for one in runs], job.gpus_per_node is not None)
    variables = [f"export {key}={shlex.quote(value)}" for key, value in plan.environment.items()]
    return _Template(text).substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(plan, job, len(runs), folder)),
        title=f"{folder.parent.name}: {plan.nodes} x {ranks} ranks",
        folder=shlex.quote(os.getcwd()),
        environment="\n".join([*plan.setup, *variables, ""]),
        run=_runs(runs),
        python=shlex.quote(sys.executable),
        limits=f"--ranks-per-node {ranks} --nodes {least}-{plan.nodes} --save-ahead {job.save_ahead}",
        srun=" \\\n    ".join(_srun(plan, job, inside)) + " \\",
        program=_program(plan, job, runs[0], inside),
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


def _srun(plan: Plan, job: Job, inside: Entry) -> list[str]:
    """The lines of the srun command before its program; a rank that fails takes the others with it."""
    tasks = plan.ranks_per_node if job.tasks == "rank" else 1
    total = f"$((nodes * {tasks}))" if tasks > 1 else '"$nodes"'
    cores = f" --cpus-per-task={job.cpus_per_task}" if job.cpus_per_task else ""  # srun forgets what sbatch was told
    return [
        f'srun --nodes="$nodes" --ntasks={total} --ntasks-per-node={tasks}{cores}',
        f'--kill-on-bad-exit=1 --output="$logs/{job.tasks}-%t.out"',
        *inside.options,
    ]


def _program(plan: Plan, job: Job, run: Path, inside: Entry) -> str:
    """What every task runs: the rank, its place set, or DeepSpeed's launcher of one node's ranks."""
    module, *arguments = plan.program
    words = " ".join([module, *(_quoted(word, run) for word in arguments)])
    python = inside.python or shlex.quote(sys.executable)
    # the signal that asks the ranks to save goes to every process of a task and would end the one around them
    first = ('trap "" USR1; ' if job.tasks == "node" or inside.before else "") + inside.first
    if job.tasks == "rank":
        script = f'{first}{slurm.PLACE}; exec "$@"'
        return f"bash -c {shlex.quote(script)} rank \\\n    {inside.before}{python} -m {words}"
    launch = '"$0" -m deepspeed.launcher.launch --node_rank=$SLURM_PROCID --world_info=$WORLD_INFO'
    meeting = "--master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    script = f'{first}exec {inside.before}{launch} {meeting} --no_local_rank --module "$@"'
    return f"bash -c {shlex.quote(script)} {python} \\\n    {words}"


def _quoted(word: str, run: Path) -> str:
    """`word` for the shell, the run's folder as the variable that the script has set."""
    start = str(run)
    return f'"$run"{shlex.quote(word[len(start) :])}' if word.startswith(start) else shlex.quote(word)


# --- before it is submitted ------------------------------------------------------------------------------------------


def save_ahead(config: RunConfig, nodes: int) -> int:
    """Seconds that the step under way and one checkpoint take at most: twice what the slowest of the run's own took.

    As long as it has saved nothing: a minute, and a checkpoint's bytes at 0.5 GB/s a node.
    """
    lines = read_metrics(config.run_dir)
    saves = [line["save_seconds"] for line in lines if "save_seconds" in line][-_LOOKED_AT:]
    if not saves:
        return _MARGIN + round(checkpoint_bytes(config) / (_DISK_RATE * nodes))
    steps = [config.batch.tokens / line["tokens_per_s"] for line in lines if "tokens_per_s" in line][-_LOOKED_AT:]
    return max(_MARGIN, round(2 * max(steps))) + round(2 * max(saves))


def check(job: Job, nodes: int) -> None:
    """Raise UserError for what is wrong in itself: more nodes at least than at most, a limit that a save takes up."""
    if job.min_nodes is not None and not 1 <= job.min_nodes <= nodes:
        raise UserError(f"--min-nodes {job.min_nodes} of --nodes {nodes}: give at least 1 and at most as many")
    if job.time is not None:
        check_limit(f"--time {job.time}", job.time, job.save_ahead)


def check_limit(whose: str, limit: str, save_ahead: int) -> None:
    """Raise UserError if a save takes up all of a time limit, which `whose` names."""
    if seconds(limit) <= save_ahead:
        raise UserError(
            f"{whose} is {seconds(limit):,} s, and the ranks are asked to save {save_ahead:,} s before its end, which "
            "a checkpoint may take: nothing would be trained; raise --time, or lower --save-ahead"
        )


def seconds(limit: str) -> int:
    """Seconds of a time limit in any of sbatch's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    fields = rest.split(":")
    if not all(field.isdecimal() for field in [*fields, *([days] if dash else [])]) or len(fields) > 3:
        raise UserError(f"--time {limit}: give minutes, minutes:seconds, hours:minutes:seconds or days-hours")
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))


def write(text: str, folder: Path) -> Path:
    """Write the script into the run's folder, and make the folder of its logs; the script's path."""
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SCRIPT, text)
    return folder / SCRIPT
