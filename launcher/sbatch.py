"""The sbatch script of a job, written to be read, edited and submitted again.

srun starts every rank, so no node needs ssh to another. The script sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. `launcher.allocation` makes the decisions that need the allocation.
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
from fusiontree.run.records import positive_values, read_metrics
from launcher import quoting, slurm
from launcher.containers import ContainerCommand, container_command
from launcher.job import Plan

SCRIPT = "job.sbatch"  # in the run's folder
_DISK_RATE = 0.5e9  # bytes/s that one node writes of a checkpoint; assumed until the run has saved one
_STEP_SECONDS = 60  # least time reserved for the current step when a job is asked to save
_WINDOW = 20  # newest saves and steps among which the slowest counts


@dataclass(frozen=True)
class JobOptions:
    """Options of a SLURM job in addition to its nodes and ranks."""

    gpus_per_node: int | None = None
    min_nodes: int | None = None  # fewest nodes to start on; None: all nodes of the plan
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None  # limit in sbatch's format; None: the partition's
    constraint: str | None = None
    cpus_per_task: int | None = None
    extra: tuple[str, ...] = ()  # further #SBATCH lines, e.g. "exclusive" or "--mem=0"
    container: str | None = None  # see `containers.container_command`
    container_mounts: str | None = None  # SOURCE:TARGET[,...]
    tasks: str = "rank"  # one task per "rank", or per "node", where DeepSpeed's launcher starts the ranks
    save_ahead: int = _STEP_SECONDS  # seconds before the time limit at which the ranks are asked to save and exit


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some values, as the tasks of one job array."""

    runs: tuple[tuple[str, ...], ...]  # overrides of each run, including its name

    @classmethod
    def from_axes(cls, name: str, axes: Sequence[str]) -> "Sweep":
        """Return the product of `axes`, each ``key=v1,v2,...``; a run's name consists of `name` and its values.

        Raises:
            UserError: an axis without values, or two runs with the same name.
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
            raise UserError(
                f"--sweep {' --sweep '.join(axes)}: two runs have the same values; remove the repeated value"
            )
        return cls(tuple(runs))


def _run_name(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._-]", "_", key.rpartition(".")[2] + value) for key, value in pairs)])


# --- the script ------------------------------------------------------------------------------------------------------


class _Template(string.Template):
    delimiter = "@"  # the shell has the dollar


def render(plan: Plan, job: JobOptions, runs: Sequence[Path], logs: Path) -> str:
    """Return the sbatch script.

    Args:
        runs: absolute paths of the runs' folders; several make a job array.
        logs: absolute path of the folder for SLURM's own output.

    Raises:
        UserError: an option or a path that sbatch or srun cannot express.
    """
    for run in runs:
        quoting.check_log_folder(run)
    text = (files("launcher") / "job.sbatch").read_text(encoding="utf-8")
    ranks, min_nodes = plan.ranks_per_node, job.min_nodes or plan.nodes
    gpus = job.gpus_per_node is not None
    container = container_command(job.container, job.container_mounts, [run.parent for run in runs], gpus)
    variables = [f"export {key}={shlex.quote(value)}" for key, value in plan.environment.items()]
    return _Template(text).substitute(
        directives="\n".join(map(quoting.directive, _directives(plan, job, len(runs), logs))),
        title=f"{logs.parent.name}: {plan.nodes} x {ranks} ranks",
        folder=shlex.quote(os.getcwd()),
        environment="\n".join([*plan.setup, *variables, ""]),
        run=_runs(runs),
        python=shlex.quote(sys.executable),
        limits=f"--ranks-per-node {ranks} --nodes {min_nodes}-{plan.nodes} --save-ahead {job.save_ahead}",
        srun=" \\\n    ".join(_srun(plan, job, container)) + " \\",
        program=_program(plan, job, runs[0], container),
    )


def _directives(plan: Plan, job: JobOptions, runs: int, logs: Path) -> list[str]:
    min_nodes = job.min_nodes or plan.nodes
    options = {
        "job-name": logs.parent.name,
        "array": f"0-{runs - 1}" if runs > 1 else None,
        "nodes": f"{min_nodes}-{plan.nodes}" if min_nodes < plan.nodes else plan.nodes,
        "ntasks-per-node": plan.ranks_per_node if job.tasks == "rank" else 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time,
        "constraint": job.constraint,
        "signal": f"USR1@{job.save_ahead}",
        "output": logs / ("slurm-%A_%a.log" if runs > 1 else "slurm-%j.log"),
    }
    lines = [f"--{name}={quoting.directive_value(str(value))}" for name, value in options.items() if value is not None]
    extra = [line if line.startswith("-") else f"--{line}" for line in job.extra]
    return [*lines, "--open-mode=append", "--requeue", *extra]


def _runs(runs: Sequence[Path]) -> str:
    """Return the line that sets ``run``, the run's folder; for a job array a case per task."""
    if len(runs) == 1:
        return f"run={shlex.quote(str(runs[0]))}\n"
    cases = [f"    {number}) run={shlex.quote(str(run))} ;;" for number, run in enumerate(runs)]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", ""])


def _srun(plan: Plan, job: JobOptions, container: ContainerCommand) -> list[str]:
    """Return the lines of the srun command before its program; a failing rank ends all others."""
    tasks = plan.ranks_per_node if job.tasks == "rank" else 1
    total = f"$((nodes * {tasks}))" if tasks > 1 else '"$nodes"'
    cores = f" --cpus-per-task={job.cpus_per_task}" if job.cpus_per_task else ""  # srun does not inherit it from sbatch
    return [
        f'srun --nodes="$nodes" --ntasks={total} --ntasks-per-node={tasks}{cores}',
        f'--kill-on-bad-exit=1 --output="$logs/{job.tasks}-%t.out"',
        *container.srun_options,
    ]


def _program(plan: Plan, job: JobOptions, run: Path, container: ContainerCommand) -> str:
    """Return the program of every task: a rank with its variables set, or DeepSpeed's launcher of a node's ranks."""
    module, *arguments = plan.program
    words = " ".join([module, *(_quoted(word, run) for word in arguments)])
    python = container.python or shlex.quote(sys.executable)
    # SLURM sends USR1 to every process of a task; without a trap it would end the rank's parent before the rank saves
    setup = ('trap "" USR1; ' if job.tasks == "node" or container.prefix else "") + container.shell_setup
    if job.tasks == "rank":
        script = f'{setup}{slurm.RANK_EXPORTS}; exec "$@"'
        return f"bash -c {shlex.quote(script)} rank \\\n    {container.prefix}{python} -m {words}"
    launch = '"$0" -m deepspeed.launcher.launch --node_rank=$SLURM_PROCID --world_info=$WORLD_INFO'
    rendezvous = "--master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    script = f'{setup}exec {container.prefix}{launch} {rendezvous} --no_local_rank --module "$@"'
    return f"bash -c {shlex.quote(script)} {python} \\\n    {words}"


def _quoted(word: str, run: Path) -> str:
    """Quote `word` for the shell, with the run's folder as the script's variable."""
    folder = str(run)
    return f'"$run"{shlex.quote(word[len(folder) :])}' if word.startswith(folder) else shlex.quote(word)


# --- checks and estimates before submission --------------------------------------------------------------------------


def estimate_save_ahead(config: RunConfig, nodes: int) -> int:
    """Return the seconds that the current step and one checkpoint take at most.

    A run that has saved counts twice its slowest recent step and save. Before the first save the step counts
    `_STEP_SECONDS`, and the checkpoint its bytes at `_DISK_RATE` per node.
    """
    lines = read_metrics(config.run_dir)
    saves = positive_values(lines, "save_seconds")[-_WINDOW:]
    if not saves:
        return _STEP_SECONDS + round(checkpoint_bytes(config) / (_DISK_RATE * nodes))
    steps = [config.batch.tokens / rate for rate in positive_values(lines, "tokens_per_s")[-_WINDOW:]]
    return max(_STEP_SECONDS, round(2 * max(steps, default=0.0))) + round(2 * max(saves))


def check_options(job: JobOptions, nodes: int) -> None:
    """Raise UserError for a node range that is empty, or a time limit that leaves no time before the save."""
    if job.min_nodes is not None and not 1 <= job.min_nodes <= nodes:
        raise UserError(f"--min-nodes is {job.min_nodes}; it must be from 1 to {nodes}, the value of --nodes")
    if job.time is not None:
        check_time_limit(f"--time {job.time}", job.time, job.save_ahead)


def check_time_limit(source: str, limit: str, save_ahead: int) -> None:
    """Raise UserError if no time before the save is left of `limit`; `source` names the limit in the message."""
    if parse_time_limit(limit) <= save_ahead:
        raise UserError(
            f"{source} is {parse_time_limit(limit):,} s, and the ranks are asked to save {save_ahead:,} s before its "
            "end: no time is left for training; raise --time, or lower --save-ahead"
        )


def parse_time_limit(limit: str) -> int:
    """Return the seconds of a time limit in any format of sbatch: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    fields = rest.split(":")
    if not all(field.isdecimal() for field in [*fields, *([days] if dash else [])]) or len(fields) > 3:
        raise UserError(f"--time {limit}: give minutes, minutes:seconds, hours:minutes:seconds or days-hours")
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))


def write_script(text: str, folder: Path) -> Path:
    """Write the script into the run's folder, create the folder of its logs, and return the script's path."""
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SCRIPT, text)
    return folder / SCRIPT
