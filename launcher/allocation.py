"""The sbatch script's helper inside an allocation: it begins an attempt of the job, and requeues the job afterwards.

``python -m launcher.allocation begin RUN ...`` prints shell assignments for the script; ``... end RUN CODE`` exits with
the script's exit code. An attempt is one start of a job: SLURM requeues the job under the same id, and the next attempt
resumes from the newest checkpoint. ``attempts.json`` in the run's folder records the newest attempt.

After a network partition a stale attempt may still be running. Its ranks are fenced off by the run's lease
(`fusiontree.run.lease`); its script finds a newer attempt in the record and leaves the job alone.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fusiontree.config import RunConfig, load_config
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.distributed.signals import STOPS
from fusiontree.errors import RunError, StoppedError, UserError
from fusiontree.files import write_atomic
from fusiontree.run.folder import ATTEMPTS_FILE, CONFIG_FILE, LOGS, newest_step
from fusiontree.run.state_files import Count, Stored, Time, read_or_none, read_stored
from launcher import rank_reports, sbatch, slurm
from launcher.job import network_settings, rendezvous_port, world_info

MAX_FAILURES = 2  # consecutive attempts that ended without a new checkpoint, after which the job is not requeued
MAX_ATTEMPTS = 5  # the same for attempts that began: after a lost node SLURM requeues, and the script never ends


class _Attempt(Stored):
    job: Annotated[str, Field(pattern=f"^{slurm.JOB_ID}$")]
    start: Count
    step: Count
    failed_attempts: Count
    nodes: list[str]
    time: Time | None = None
    message: str | None = None


def begin(run: Path, ranks_per_node: int, min_nodes: int, max_nodes: int, save_ahead: int) -> dict[str, str]:
    """Record a new attempt, log its nodes and rendezvous, and return the script's shell variables.

    Args:
        save_ahead: seconds before the time limit at which the ranks are asked to save.

    Raises:
        RunError: too many attempts without a new checkpoint.
        UserError: the batch is not divisible by the ranks of any number of the allocated nodes.
    """
    job, step = slurm.current_job_id(), newest_step(run)
    allocated = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    config = load_config(str(run / CONFIG_FILE))
    nodes = allocated[: fitting_nodes(config, len(allocated), ranks_per_node, min_nodes)]
    record = _next_record(_newest_attempt(run, job, step), job, step, nodes)
    if record["failed_attempts"] >= MAX_ATTEMPTS:
        raise RunError(
            f"job {job} has begun {MAX_ATTEMPTS} attempts from step {step} without a new checkpoint; fix the cause "
            f"(see {run / LOGS}) and submit the script again"
        )
    write_atomic(run / ATTEMPTS_FILE, json.dumps(record, indent=1))
    logs = run / LOGS / f"{job}-{record['start']}"
    logs.mkdir(parents=True, exist_ok=True)
    port = rendezvous_port(int(os.environ["SLURM_JOB_ID"]))
    place = f"{' '.join(nodes)}, rendezvous at {nodes[0]}:{port}"
    _log(f"attempt {record['start']} from step {step} on {place}; the ranks' output is in {logs}")
    if len(nodes) < max_nodes:
        spare = f", {len(allocated)} allocated" if len(allocated) > len(nodes) else ""
        _log(f"using {len(nodes)} of {max_nodes} nodes (at least {min_nodes}{spare}), whose ranks divide the batch")
    if step and (needed := sbatch.estimate_save_ahead(config, len(nodes))) > save_ahead:
        _log(f"steps and saves take longer than reserved: submit the next job with --save-ahead {needed}")
    for line in network_settings(os.environ):
        _log(line)
    return {
        "nodes": str(len(nodes)),
        "logs": str(logs),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(port),
        "WORLD_INFO": world_info(dict.fromkeys(nodes, range(ranks_per_node))),
        LAUNCH_FOLDER: str(logs),
    }


def fitting_nodes(config: RunConfig, allocated: int, ranks_per_node: int, min_nodes: int) -> int:
    """Return the largest number of nodes, from `min_nodes` to `allocated`, whose ranks divide the batch.

    Raises:
        UserError: no number fits; the message is about `min_nodes`.
    """
    for nodes in range(allocated, min_nodes - 1, -1):
        try:
            config.accumulation_steps(nodes * ranks_per_node)
        except UserError as error:
            failure = error
        else:
            return nodes
    raise failure


def _next_record(previous: dict[str, Any], job: str, step: int, nodes: list[str]) -> dict[str, Any]:
    """Return the record of an attempt from `step`; a newly submitted job starts to count from 0."""
    requeued = previous.get("job") == job
    failed_attempts = previous["failed_attempts"] + 1 if requeued and step <= previous["step"] else 0
    start = previous["start"] + 1 if requeued else 0
    counts = {"job": job, "start": start, "step": step, "failed_attempts": failed_attempts}
    return counts | {"nodes": nodes, "time": time.time()}


def end(run: Path, code: int) -> int:
    """Log the end of an attempt, requeue the job if it is unfinished, and return the script's exit code.

    Args:
        code: exit code of srun: the largest of all ranks' codes.
    """
    if code == 0:
        return 0
    record = _newest_attempt(run, slurm.current_job_id(), newest_step(run))
    if not record:
        _log(f"not requeued: {run} has no record of this attempt; submit the script again")
        return code
    logs = run / LOGS / f"{record['job']}-{record['start']}"
    if os.environ[LAUNCH_FOLDER] != str(logs):
        _log(f"a newer attempt of the run has taken over ({logs.name}); this stale attempt ends")
        return code
    failure = rank_reports.first_failure(logs)
    stop = next((number for number in STOPS if code == 128 + number), None)  # srun's code for a task that it killed
    if stop is not None and not rank_reports.started_hosts(logs):
        failure = rank_reports.Failure(StoppedError.exit_code, f"stopped by {stop.name} before any rank started")
    message = f"srun ended with code {code}; see {logs}" if failure is None else failure.message
    _log(message)
    if failure is not None and failure.code is not None:
        code = failure.code
    step = newest_step(run)
    failed_attempts = 0 if step > record["step"] else record["failed_attempts"] + 1
    write_atomic(
        run / ATTEMPTS_FILE, json.dumps(record | {"code": code, "message": message, "reached": step}, indent=1)
    )
    if code == UserError.exit_code:
        return code
    if failed_attempts >= MAX_FAILURES:
        _log(f"not requeued: {failed_attempts} attempts from step {step} without a new checkpoint; see {logs}")
        return code
    return _requeue(record["job"], step, code)


def _requeue(job: str, step: int, code: int) -> int:
    """Requeue the job unless SLURM or a user is ending it, and return the exit code of the script."""
    if [task.get("JobState") for task in slurm.query_tasks(job)] != ["RUNNING"]:
        return code
    _log(f"requeued: the next attempt resumes from step {step}")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        _log(f"scontrol requeue {job} failed: {' '.join(done.stderr.split())}; submit the script again")
    else:
        time.sleep(60)  # wait for SLURM to kill this script: if it returned, the job would count as failed
    return code


def read_attempts(run: Path, fallback: str) -> dict[str, Any] | None:
    """Return the record of the newest attempt of the run's newest job.

    Returns:
        None if there is no record, or if it is damaged: then it is named, with `fallback`, on the console.
    """
    record = read_or_none(run / ATTEMPTS_FILE, lambda path: read_stored(path, _Attempt), fallback)
    return None if record is None else record.model_dump(exclude_none=True)


def _newest_attempt(run: Path, job: str, step: int) -> dict[str, Any]:
    """Return the record of the newest attempt; without a valid one, the attempt of `job` that its logs show.

    An attempt known by its logs counts as its job's first without a checkpoint. The record is empty if there are none.
    """
    record = read_attempts(run, "attempts without a checkpoint are counted from zero again")
    if record is not None:
        return record
    names = (path.name.removeprefix(f"{job}-") for path in (run / LOGS).glob(f"{job}-*"))
    start = max((int(name) for name in names if re.fullmatch("[0-9]{1,9}", name)), default=None)
    return {} if start is None else {"job": job, "start": start, "step": step, "failed_attempts": 0}


def _log(line: str) -> None:
    print(f"fusiontree: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one of the sbatch script's two commands and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.allocation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    begin_parser = commands.add_parser("begin")
    begin_parser.add_argument("run", type=Path)
    begin_parser.add_argument("--ranks-per-node", type=int, required=True)
    begin_parser.add_argument("--nodes", required=True, metavar="MIN-MAX")
    begin_parser.add_argument("--save-ahead", type=int, required=True)
    end_parser = commands.add_parser("end")
    end_parser.add_argument("run", type=Path)
    end_parser.add_argument("code", type=int)
    args = parser.parse_args(argv)
    try:
        if args.command == "end":
            return end(args.run, args.code)
        fewest, _, most = args.nodes.partition("-")
        variables = begin(args.run, args.ranks_per_node, int(fewest), int(most), args.save_ahead)
    except (UserError, RunError) as error:
        _log(f"error: {error}")
        return error.exit_code
    for name, value in variables.items():
        print(f"{'export ' * name.isupper()}{name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
