"""Where figures go: ``metrics.jsonl``, the console's progress line, and the trackers asked for (`sinks.py`)."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.files import read_json_lines, write_atomic
from fusiontree.flops import peak_flops
from fusiontree.training.progress import ProgressLine
from fusiontree.training.sinks import WandbSink, open_sinks

FILE = "metrics.jsonl"


class Metrics:
    """The main rank's record of a run. Use as a context manager."""

    def __init__(self, config: RunConfig, step: int | None, wandb_id: str | None):
        """Continue the record behind `step` updates, or begin it (None); lines of lost updates are dropped."""
        self.path = config.run_dir / FILE
        _keep_until(self.path, -1 if step is None else step)
        self.sinks = open_sinks(config, step, wandb_id)
        self.progress = ProgressLine(config.schedule.steps, step or 0)

    def __enter__(self) -> "Metrics":
        self.file = open(self.path, "a", buffering=1)
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.file.close()
        for sink in self.sinks:
            sink.close()

    @property
    def wandb_id(self) -> str | None:
        """The wandb run that a resume continues."""
        return next((sink.id for sink in self.sinks if isinstance(sink, WandbSink)), None)

    def record(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Write one line of figures (`step` among them) everywhere; `eta_s`: seconds to the end of the run.

        Perplexities are added.
        """
        figures = {**figures, **_perplexities(figures)}
        self.file.write(json.dumps(figures) + "\n")
        for sink in self.sinks:
            sink.log(int(figures["step"]), {name: value for name, value in figures.items() if name != "step"})
        if "val_loss" in figures:
            console.print(f"step {figures['step']:>6,}  validation loss {figures['val_loss']:.4f}")
        else:
            self.progress.show(figures, eta_s)


def utilisation(flops_per_s: float, device_name: str) -> dict[str, float]:
    """What a device does with its time, from the model's own FLOPs per second; MFU only where its peak is known."""
    peak = peak_flops(device_name)
    return {"tflop_per_s": flops_per_s / 1e12} | ({} if peak is None else {"mfu": flops_per_s / peak})


def _perplexities(figures: Mapping[str, float]) -> dict[str, float]:
    """exp(loss), of a token; a loss that no float can hold the exponential of counts as the largest that one can."""
    names = {"loss": "perplexity", "val_loss": "val_perplexity"}
    return {name: math.exp(min(figures[of], 700.0)) for of, name in names.items() if of in figures}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first; one that a crash cut short is left out."""
    return read_json_lines(run_dir / FILE)


def summarise(run_dir: Path) -> dict[str, float | None]:
    """First and last validation loss (nats per token) and median tokens/s of a run; None where it has none."""
    lines = read_metrics(run_dir)
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return {
        "first_val_loss": validation[0] if validation else None,
        "last_val_loss": validation[-1] if validation else None,
        "tokens_per_s": statistics.median(rates) if rates else None,
    }


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines behind `step`, and a last one that a crash cut short."""
    if not path.exists():
        return
    kept = [line for line in read_json_lines(path) if line["step"] <= step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
