"""Status of a run, from its folder and SLURM's queue. Imports no torch, for a fast answer."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig, load_config
from fusiontree.errors import UserError
from fusiontree.run import incidents, lease
from fusiontree.run.folder import CONFIG_FILE, LEASE_FILE, METRICS_FILE, checkpoint_path, newest_step
from fusiontree.run.records import iter_metrics
from fusiontree.run.state_files import read_or_none
from launcher import allocation, slurm

_INCIDENTS_SHOWN = 3  # the newest
_FIGURES = ("tokens", "loss", "lr", "grad_norm", "gate_mean", "tokens_per_s", "mfu", "memory_gib")
_STALE_SECONDS = 600.0  # age of the newest metrics from which a run on another host no longer counts as running


def status(run_dir: Path) -> dict[str, Any]:
    """Return the status of the run at `run_dir`.

    Returns:
        run, state (finished, running, pending, stopped or ended, with details), step, steps, last figures of training,
        validation loss (nats per token), checkpoint, job (None without SLURM), incidents (count and newest).

    Raises:
        UserError: there is no run.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"no run at {run_dir}; give a run's folder, e.g. runs/NAME")
    config = load_config(str(run_dir / CONFIG_FILE))
    saved, (step, figures) = newest_step(run_dir), _newest(iter_metrics(run_dir))
    job = _job(run_dir)
    records = incidents.read(run_dir)
    return {
        "run": str(run_dir),
        "state": _state(run_dir, config, saved, job, bool(records and records[-1]["kind"] == "signal")),
        "step": step,
        "steps": config.schedule.steps,
        **figures,
        "checkpoint": {"step": saved, "age_seconds": _age(checkpoint_path(run_dir, saved))} if saved else None,
        "job": job,
        "incidents": {"count": len(records), "newest": [_incident(entry) for entry in records[-_INCIDENTS_SHOWN:]]},
    }


def _newest(lines: Iterable[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Return the last step, and the newest figures of training and of validation."""
    newest: dict[str, dict[str, Any]] = {key: {} for key in ("step", "loss", "val_loss")}  # the last line with each
    for line in lines:
        newest |= {key: line for key in newest if key in line}
    figures = {name: newest["loss"][name] for name in _FIGURES if name in newest["loss"]}
    return newest["step"].get("step", 0), {"last": figures or None, "val_loss": newest["val_loss"].get("val_loss")}


def _state(run_dir: Path, config: RunConfig, saved: int, job: dict[str, Any] | None, was_stopped: bool) -> str:
    if saved >= config.schedule.steps:
        return "finished"
    queue_state = (job or {}).get("state")
    if queue_state in slurm.ACTIVE_STATES:
        return str(queue_state).lower()
    if not (run_dir / LEASE_FILE).exists():
        return "not started"
    holder = read_or_none(run_dir / LEASE_FILE, lambda _: lease.read(run_dir), "the run's host is unknown")
    alive = None if holder is None else lease.is_alive(holder)
    host = "an unknown host" if holder is None else holder["host"]
    if holder is not None and alive:
        return f"running on {host} (pid {holder['pid']})"
    age = _age(run_dir / METRICS_FILE)
    if alive is None and age is not None and age < _STALE_SECONDS:
        return f"running on {host}, judging by its files"
    return "stopped, saved" if was_stopped else "ended before its last step"


def _job(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest job of the run: the record of its attempts and, where SLURM is available, its queue entry."""
    record = allocation.read_attempts(run_dir, "the job's attempts are unknown")
    if record is None and (job := slurm.submitted_job_id(run_dir)) is not None:
        record = {"job": job}
    if record is None:
        return None
    tasks = slurm.query_tasks(record["job"])[:1] if shutil.which("scontrol") else []
    names = {"JobState": "state", "Reason": "reason", "RunTime": "run_time", "TimeLimit": "time_limit"}
    queued = {
        name: task[slurm_name] for task in tasks for slurm_name, name in names.items() if task.get(slurm_name) != "None"
    }
    recorded = {
        name: record[name] for name in ("job", "start", "nodes", "failed_attempts", "message") if name in record
    }
    return recorded | queued


def _incident(entry: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    text = f"{entry['kind']}: {entry['message']}"
    shown = "".join(character if character.isprintable() else " " for character in text)
    return f"{when} step {entry['step']:,} {shown}"


def _age(path: Path) -> float | None:
    """Return the seconds since `path` was written, or None if it does not exist."""
    return round(time.time() - path.stat().st_mtime, 1) if path.exists() else None
