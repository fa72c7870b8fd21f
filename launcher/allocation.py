"""What the sbatch script asks inside an allocation: how a start begins, and what becomes of the job when it has ended.

``python -m launcher.allocation begin RUN ...`` prints shell assignments, ``... end RUN CODE`` ends with the script's
exit code. The record of a job's starts is ``attempts.json`` in the run's folder.
"""

import argparse
import base64
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig, load_config
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.distributed.ports import free_port
from fusiontree.errors import RunError, UserError
from fusiontree.files import write_atomic
from fusiontree.run.folder import ATTEMPTS_FILE, CONFIG_FILE, LOGS, newest_step
from launcher import rank_reports, sbatch, slurm
from launcher.job import FIRST_PORT, PORTS, network_settings

FAILURES = 2  # ends in a row without progress after which a job is not requeued
STARTS = 5  # starts in a row without progress after which it is not begun: SLURM requeues by itself after a lost node


def begin(run: Path, ranks_per_node: int, least: int, most: int, save_ahead: int) -> dict[str, str]:
    """Begin a start of the job: shell variables for the rest of the script; the facts go to the job's log.

    Args:
        save_ahead: seconds before the time limit at which the ranks are asked to save.

    Raises:
        RunError: the job has started too often without progress.
        UserError: no number of the nodes there are fits the batch.
    """
    job, step = slurm.this_job(), newest_step(run)
    nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    config = load_config(str(run / CONFIG_FILE))
    taken = nodes[: fitting_nodes(config, len(nodes), ranks_per_node, least)]
    record = _next(read_attempts(run), job, step, taken)
    if record["failed_attempts"] >= STARTS:
        raise RunError(
            f"job {job} has started {STARTS} times from step {step} without getting further; see {run / LOGS}"
        )
    write_atomic(run / ATTEMPTS_FILE, json.dumps(record, indent=1))
    logs = run / LOGS / f"{job}-{record['start']}"
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port(FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS)
    where = f"{' '.join(taken)}, meeting at {taken[0]}:{port}"
    _say(f"start {record['start']} from step {step} on {where}; the ranks' output is in {logs}")
    if len(taken) < most:
        spare = f", {len(nodes)} given" if len(nodes) > len(taken) else ""
        _say(f"on {len(taken)} of {most} nodes ({least} at least{spare}): the batch of the run divides among these")
    if step and (needed := sbatch.save_ahead(config, len(taken))) > save_ahead:
        _say(f"steps and saves are slower than foreseen: submit the next job with --save-ahead {needed}")
    for line in network_settings(os.environ):
        _say(line)
    return {
        "nodes": str(len(taken)),
        "logs": str(logs),
        "MASTER_ADDR": taken[0],
        "MASTER_PORT": str(port),
        "WORLD_INFO": _world_info(taken, ranks_per_node),
        LAUNCH_FOLDER: str(logs),
    }


def fitting_nodes(config: RunConfig, given: int, ranks_per_node: int, least: int) -> int:
    """The largest number of `given` nodes, `least` at least, among whose ranks the batch divides.

    Raises:
        UserError: there is none; the message is that for all of them.
    """
    for nodes in range(given, least - 1, -1):
        try:
            config.accumulation_steps(nodes * ranks_per_node)
        except UserError as error:
            failure = error
        else:
            return nodes
    raise failure


def _world_info(nodes: Sequence[str], ranks_per_node: int) -> str:
    """What DeepSpeed's node launcher reads: the ranks' devices by node, as it encodes them."""
    return base64.urlsafe_b64encode(json.dumps({node: list(range(ranks_per_node)) for node in nodes}).encode()).decode()


def _next(before: dict[str, Any], job: str, step: int, nodes: list[str]) -> dict[str, Any]:
    """The record of a start at `step`; a job that was submitted anew begins to count anew."""
    again = before.get("job") == job
    failed_attempts = before["failed_attempts"] + 1 if again and step <= before["step"] else 0
    start = before["start"] + 1 if again else 0
    return {
        "job": job,
        "start": start,
        "step": step,
        "failed_attempts": failed_attempts,
        "nodes": nodes,
        "time": time.time(),
    }


def end(run: Path, code: int) -> int:
    """Say how a start ended and requeue the job if it has more to do; the exit code of the script.

    Args:
        code: what srun returned, which is the largest of all ranks' codes.
    """
    record = read_attempts(run)
    logs = run / LOGS / f"{record['job']}-{record['start']}"
    if os.environ[LAUNCH_FOLDER] != str(logs):
        _say(f"a newer start of the run has taken over ({logs.name}); this one ends")
        return code
    if code == 0:
        return 0
    failure = rank_reports.first_failure(logs)
    message = f"srun ended with code {code}; see {logs}" if failure is None else failure.message
    _say(message)
    if failure is not None and failure.code is not None:
        code = failure.code
    step = newest_step(run)
    failed_attempts = 0 if step > record["step"] else record["failed_attempts"] + 1
    write_atomic(
        run / ATTEMPTS_FILE, json.dumps(record | {"code": code, "message": message, "reached": step}, indent=1)
    )
    if code == UserError.exit_code:
        return code
    if failed_attempts >= FAILURES:
        _say(f"not requeued: {failed_attempts} starts from step {step} without a checkpoint beyond it; see {logs}")
        return code
    return _requeue(record["job"], step, code)


def _requeue(job: str, step: int, code: int) -> int:
    """Give the job back to the queue, unless it is being ended from outside; the exit code if that fails."""
    if [task.get("JobState") for task in slurm.tasks(job)] != ["RUNNING"]:
        return code
    _say(f"requeued: goes on from step {step}")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f"scontrol requeue {job} failed: {' '.join(done.stderr.split())}; submit the script again")
    else:
        time.sleep(60)  # SLURM ends this script; to return would be a failed job
    return code


def read_attempts(run: Path) -> dict[str, Any]:
    """The record of the newest start of the run's newest job; empty if it never had one."""
    path = run / ATTEMPTS_FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _say(line: str) -> None:
    print(f"fusiontree: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The two commands of the sbatch script."""
    parser = argparse.ArgumentParser(prog="python -m launcher.allocation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    beginning = commands.add_parser("begin")
    beginning.add_argument("run", type=Path)
    beginning.add_argument("--ranks-per-node", type=int, required=True)
    beginning.add_argument("--nodes", required=True, metavar="LEAST-MOST")
    beginning.add_argument("--save-ahead", type=int, required=True)
    ending = commands.add_parser("end")
    ending.add_argument("run", type=Path)
    ending.add_argument("code", type=int)
    args = parser.parse_args(argv)
    try:
        if args.command == "end":
            return end(args.run, args.code)
        least, _, most = args.nodes.partition("-")
        facts = begin(args.run, args.ranks_per_node, int(least), int(most), args.save_ahead)
    except (UserError, RunError) as error:
        _say(f"error: {error}")
        return error.exit_code
    for name, value in facts.items():
        print(f"{'export ' * name.isupper()}{name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
