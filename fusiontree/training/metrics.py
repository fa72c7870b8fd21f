"""Metrics of a run: ``metrics.jsonl``, ``layers.jsonl``, the console's progress line and trackers (`tracker.py`).

Free of torch.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.model.flops import update_flops
from fusiontree.run import incidents, lease
from fusiontree.run.folder import LAYERS_FILE, METRICS_FILE
from fusiontree.run.jsonlines import JsonLines
from fusiontree.run.records import keep_until
from fusiontree.training.progress import ProgressLine
from fusiontree.training.sinks import Histogram, new_run_id
from fusiontree.training.tracker import END_SECONDS, STOP_SECONDS, close_trackers, open_trackers

BINS = 20  # of a gate's histogram, from 0 to 1


class LayerFigures(NamedTuple):
    """Figures of one update by layer, over all ranks and accumulation steps."""

    gate_mean: list[float]  # over real tokens and channels; 1 is all Mamba
    gate_std: list[float]  # of the channels' means
    gate_histogram: list[list[int]]  # [layers, BINS]: channels by their mean
    mamba_rms: list[float]  # root mean square of the branch's output, over real tokens and channels
    attention_rms: list[float]
    grad_norm: list[float]  # of the layer's parameters, before clipping
    other_grad_norm: list[float]  # [1]: embedding, last norm and head


class Lap:
    """A group of updates timed together. Validation and checkpoints fall between laps, so tokens/s excludes them."""

    def __init__(self, step: int):
        """Start the lap after `step` updates."""
        self.step, self.began = step, time.perf_counter()
        self.documents: list[int] = []  # lengths of this rank's documents, in tokens

    def elapsed(self, step: int) -> tuple[int, float]:
        """Return updates and seconds since the lap's start; `step`: updates done now."""
        return step - self.step, time.perf_counter() - self.began


class Metrics:
    """The main rank's record of a run. Use as a context manager."""

    def __init__(self, config: RunConfig, step: int | None, wandb_id: str | None):
        """Continue the record after `step` updates and drop later lines, or start it (None).

        Args:
            config: the run.
            step: updates done.
            wandb_id: the id of the run at wandb, which a resume continues; None draws one if wandb is configured.
        """
        self.model, self.folder = config.model, config.run_dir
        self.figures, self.layers = (JsonLines(self.folder / name) for name in (METRICS_FILE, LAYERS_FILE))
        for lines in (self.figures, self.layers):
            keep_until(lines.path, -1 if step is None else step)
        self.wandb_id = wandb_id or (new_run_id() if config.logging.wandb else None)
        self.trackers = open_trackers(config, step, self.wandb_id)
        self.progress = ProgressLine(config.schedule.steps, step or 0)

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        self.figures.close()
        self.layers.close()
        close_trackers(self.trackers, END_SECONDS if kind is None else STOP_SECONDS)

    def record(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Write one line of figures, with their perplexities, to the file, the trackers and the console.

        Args:
            figures: by name, `step` among them.
            eta_s: seconds to the end of the run.

        Raises:
            RunError: a newer start of the run has taken the lease.
        """
        lease.check(self.folder)
        figures = {**figures, **_perplexities(figures)}
        self.figures.add(figures)
        incidents.flush(self.folder)
        tracked = {name: value for name, value in figures.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(int(figures["step"]), tracked)
        if "val_loss" in figures:
            console.print(f"step {figures['step']:>6,}  validation loss {figures['val_loss']:.4f}")
        else:
            self.progress.show(figures, eta_s)

    def record_layers(self, step: int, figures: LayerFigures, documents: Sequence[int]) -> None:
        """Write one line of layer figures, with the shares of the model's FLOPs by part.

        Args:
            step: updates done.
            figures: the figures.
            documents: lengths, in tokens, of the main rank's documents in this update.
        """
        flops = update_flops(self.model, documents)
        shares = {part: round(count / sum(flops.values()), 6) for part, count in flops.items() if count}
        self.layers.add({"step": step, **figures._asdict(), "flop_share": shares})
        tracked = _by_layer(figures) | {f"flop_share/{part}": share for part, share in shares.items()}
        for tracker in self.trackers:
            tracker.log(step, tracked)


def _by_layer(figures: LayerFigures) -> dict[str, float | Histogram]:
    """Return the figures as trackers show them: one name per layer."""
    values = figures._asdict()
    edges = [i / BINS for i in range(BINS + 1)]
    named: dict[str, float | Histogram] = {}
    for layer, counts in enumerate(values.pop("gate_histogram")):
        named[f"gate/layer_{layer:02}"] = Histogram(counts, edges)
    named["grad_norm/other"] = values.pop("other_grad_norm")[0]
    for name, by_layer in values.items():
        named |= {f"{name}/layer_{layer:02}": value for layer, value in enumerate(by_layer)}
    return named


def _perplexities(figures: Mapping[str, float]) -> dict[str, float]:
    """Return exp(loss) for each loss; losses above 700 count as 700, whose exponential a float can still represent."""
    names = {"loss": "perplexity", "val_loss": "val_perplexity"}
    return {name: math.exp(min(figures[loss], 700.0)) for loss, name in names.items() if loss in figures}
