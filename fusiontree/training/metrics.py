"""Metrics of a run: ``metrics.jsonl``, ``layers.jsonl``, the console's progress line and trackers (`sinks.py`).

Free of torch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.errors import short_cause
from fusiontree.model.flops import update_flops
from fusiontree.run import incidents, lease
from fusiontree.run.folder import LAYERS_FILE, METRICS_FILE
from fusiontree.run.jsonlines import JsonLines
from fusiontree.run.records import keep_until
from fusiontree.training.progress import ProgressLine
from fusiontree.training.sinks import Histogram, Sink, WandbSink, open_sinks

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
        """Continue the record after `step` updates and drop later lines, or start it (None)."""
        self.model, self.folder = config.model, config.run_dir
        self.figures, self.layers = (JsonLines(self.folder / name) for name in (METRICS_FILE, LAYERS_FILE))
        for lines in (self.figures, self.layers):
            keep_until(lines.path, -1 if step is None else step)
        self.sinks = open_sinks(config, step, wandb_id)
        self.progress = ProgressLine(config.schedule.steps, step or 0)

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.figures.close()
        self.layers.close()
        self._for_each_sink(lambda sink: sink.close())

    @property
    def wandb_id(self) -> str | None:
        """The id of the wandb run, for a resume."""
        return next((sink.id for sink in self.sinks if isinstance(sink, WandbSink)), None)

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
        self._for_each_sink(lambda sink: sink.log(int(figures["step"]), tracked))
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
        self._for_each_sink(lambda sink: sink.log(step, tracked))

    def _for_each_sink(self, act: Callable[[Sink], None]) -> None:
        """Call `act` for each tracker; drop a tracker that cannot write, such as TensorBoard on a full disk."""
        for sink in [*self.sinks]:
            try:
                act(sink)
            except OSError as error:
                self.sinks.remove(sink)
                name = type(sink).__name__.removesuffix("Sink")
                console.print(f"{name}: {short_cause(error)}; no more metrics are sent to it", markup=False)


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
