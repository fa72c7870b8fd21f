"""Readers of a run's recorded figures."""

import json
import statistics
from pathlib import Path
from typing import Any

from fusiontree.files import write_atomic
from fusiontree.run.folder import METRICS_FILE
from fusiontree.run.jsonlines import read_json_lines


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, oldest first, without truncated lines."""
    return read_json_lines(run_dir / METRICS_FILE)


def summarize(run_dir: Path) -> dict[str, float | None]:
    """Return first and last validation loss (nats per token) and median tokens/s of a run, each None if unknown."""
    lines = read_metrics(run_dir)
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return {
        "first_val_loss": validation[0] if validation else None,
        "last_val_loss": validation[-1] if validation else None,
        "tokens_per_s": statistics.median(rates) if rates else None,
    }


def keep_until(path: Path, step: int) -> None:
    """Drop lines after `step` and truncated lines."""
    if not path.exists():
        return
    kept = [line for line in read_json_lines(path) if line["step"] <= step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
