"""How a run is doing, from its folder and, if SLURM is here, from the queue. Free of torch: it answers at once."""

import shutil
import time
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig, load_config
from fusiontree.errors import UserError
from fusiontree.run import incidents, lease
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, LATEST, METRICS_FILE, newest_step
from fusiontree.run.records import read_metrics
from launcher import allocation, slurm

_SHOWN = 3  # incidents, the newest
_FIGURES = ("tokens", "loss", "lr", "grad_norm", "gate_mean", "tokens_per_s", "mfu", "memory_gib")
_QUIET = 600.0  # seconds without a line of metrics after which a run that cannot be seen is not called running


def status(run_dir: Path) -> dict[str, Any]:
    """The state of the run at `run_dir`.

    Returns:
        run, state (finished, running, pending, stopped or failed, with what is known of it), step, steps, last figures,
        validation loss (nats per token), checkpoint, job (None without SLURM), incidents (how many, and the newest).

    Raises:
        UserError: there is no run.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"no run at {run_dir}; give a folder such as runs/NAME")
    config = load_config(str(run_dir / CONFIG_FILE))
    lines = read_metrics(run_dir)
    saved, step = newest_step(run_dir), max((line["step"] for line in lines), default=0)
    job = _job(run_dir)
    happened = incidents.read(run_dir)
    return {
        "run": str(run_dir),
        "state": _state(run_dir, config, saved, job, bool(happened and happened[-1]["kind"] == "signal")),
        "step": step,
        "steps": config.schedule.steps,
        **_newest(lines),
        "checkpoint": {"step": saved, "age_seconds": _age(run_dir / CHECKPOINTS / LATEST)} if saved else None,
        "job": job,
        "incidents": {"count": len(happened), "newest": [_incident(entry) for entry in happened[-_SHOWN:]]},
    }


def _newest(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest figures of training and of validation."""
    nothing: dict[str, Any] = {}
    training = next((line for line in reversed(lines) if "loss" in line), nothing)
    validation = next((line for line in reversed(lines) if "val_loss" in line), nothing)
    figures = {name: training[name] for name in _FIGURES if name in training}
    return {"last": figures or None, "val_loss": validation.get("val_loss")}


def _state(run_dir: Path, config: RunConfig, saved: int, job: dict[str, Any] | None, was_stopped: bool) -> str:
    if saved >= config.schedule.steps:
        return "finished"
    queue = (job or {}).get("state")
    if queue in slurm.LIVING:
        return str(queue).lower()
    holder = lease.read(run_dir)
    alive = None if holder is None else lease.is_alive(holder)
    if holder is not None and alive:
        return f"running on {holder['host']} (pid {holder['pid']})"
    if holder is None:
        return "not started"
    age = _age(run_dir / METRICS_FILE)
    if alive is None and age is not None and age < _QUIET:
        return f"running on {holder['host']}, as far as its files tell"
    return "stopped, saved" if was_stopped else "ended before its last step"


def _job(run_dir: Path) -> dict[str, Any] | None:
    """The newest job of the run: what its starts have recorded and, if SLURM is here, the queue's view."""
    record = allocation.read_attempts(run_dir) or {"job": slurm.submitted(run_dir)}
    if record["job"] is None:
        return None
    known = slurm.tasks(record["job"])[:1] if shutil.which("scontrol") else []
    queue = {"JobState": "state", "Reason": "reason", "RunTime": "run_time", "TimeLimit": "time_limit"}
    seen = {ours: task[theirs] for task in known for theirs, ours in queue.items() if task.get(theirs) != "None"}
    kept = {name: record[name] for name in ("job", "start", "nodes", "failed_attempts", "message") if name in record}
    return kept | seen


def _incident(entry: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    return f"{when} step {entry['step']:,} {entry['kind']}: {entry['message']}"


def _age(path: Path) -> float | None:
    """Seconds since `path` was written; None if it is not there."""
    return round(time.time() - path.stat().st_mtime, 1) if path.exists() else None
