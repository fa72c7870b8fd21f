"""Where figures go: ``metrics.jsonl``, the console's progress line, and wandb if asked for."""

import json
import os
import statistics
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.files import write_atomic

LINE_WIDTH = 80  # characters that a progress line is made to fit
PLAIN_INTERVAL = 10.0  # seconds between progress lines where the console is no terminal


class Metrics:
    """The main rank's record of a run. Use as a context manager."""

    def __init__(self, config: RunConfig, step: int | None, wandb_id: str | None):
        """Continue the record behind `step` updates, or begin it (None); lines of lost updates are dropped."""
        self.path = config.run_dir / "metrics.jsonl"
        self.steps = config.schedule.steps
        _keep_until(self.path, -1 if step is None else step)
        self.wandb = _start_wandb(config, wandb_id)
        self.last_plain = 0.0
        self.val_loss: float | None = None
        bar = [BarColumn(bar_width=20)] if console.width >= LINE_WIDTH + 22 else []  # the figures come first
        self.bar = Progress(*bar, TextColumn("{task.fields[line]}"), console=console)
        self.task = self.bar.add_task("train", total=self.steps, completed=step or 0, line="starting")

    def __enter__(self) -> "Metrics":
        self.file = open(self.path, "a", buffering=1)
        if console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    @property
    def wandb_id(self) -> str | None:
        """The wandb run that a resume continues."""
        return None if self.wandb is None else self.wandb.id

    def record(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Write one line of figures (`step` among them) everywhere; `eta_s`: seconds to the end of the run."""
        self.file.write(json.dumps(figures) + "\n")
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in figures.items() if k != "step"}, step=int(figures["step"]))
        if "val_loss" in figures:
            self.val_loss = figures["val_loss"]
            console.print(f"step {figures['step']:>6,}  validation loss {figures['val_loss']:.4f}")
        else:
            self._show(figures, eta_s)

    def _show(self, figures: Mapping[str, float], eta_s: float | None) -> None:
        line = (
            f"step {figures['step']:,}/{self.steps:,}  loss {figures['loss']:.3f}  lr {figures['lr']:.1e}  "
            f"gate {figures['gate_mean']:.3f}  {figures['tokens_per_s']:,.0f} tokens/s"
        )
        if eta_s is not None:
            line += f"  ETA {timedelta(seconds=int(eta_s))}"
        self.bar.update(self.task, completed=figures["step"], line=line)
        if not console.is_terminal and time.monotonic() - self.last_plain > PLAIN_INTERVAL:
            self.last_plain = time.monotonic()
            console.print(line)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first; empty if there are none."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(kept))


def _start_wandb(config: RunConfig, run_id: str | None) -> Any:
    """The wandb run, offline unless a key is there; None if not asked for, or (said once) not installed."""
    if not config.logging.wandb:
        return None
    try:
        import wandb
    except ImportError:
        console.print("wandb is not installed: metrics go to metrics.jsonl only (pip install 'fusiontree[wandb]')")
        return None
    has_key = "WANDB_API_KEY" in os.environ or wandb.api.api_key is not None
    mode: Any = os.environ.get("WANDB_MODE", "online" if has_key else "offline")
    return wandb.init(
        project="fusiontree",
        name=config.name,
        id=run_id,
        resume="allow",
        dir=config.run_dir,
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True),
    )
