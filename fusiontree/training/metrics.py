"""Where figures go: ``metrics.jsonl``, ``layers.jsonl``, the console's progress line, and trackers (`sinks.py`).

Free of torch, for reports read here what runs have written.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.model.flops import update_flops
from fusiontree.run import incidents, lease
from fusiontree.run.folder import LAYERS_FILE, METRICS_FILE
from fusiontree.run.jsonlines import JsonLines
from fusiontree.run.records import keep_until
from fusiontree.training.progress import ProgressLine
from fusiontree.training.sinks import Histogram, Sink, WandbSink, open_sinks

BINS = 20  # of a gate's histogram, from 0 to 1


class LayerFigures(NamedTuple):
    """Figures of one update, by layer, over all ranks and accumulation steps."""

    gate_mean: list[float]  # over the real tokens and the channels; 1 is all Mamba
    gate_std: list[float]  # of the channels' means
    gate_histogram: list[list[int]]  # [layers, BINS], channels by their mean
    mamba_rms: list[float]  # root mean square of the branch's output, over the real tokens and the channels
    attention_rms: list[float]
    grad_norm: list[float]  # of the layer's part of the whole gradient, before clipping
    other_grad_norm: list[float]  # [1], of what belongs to no layer: embedding, last norm, head


class Lap:
    """Updates that are timed together; validation and checkpoints lie between two laps and are no part of tokens/s."""

    def __init__(self, step: int):
        """Begin, behind `step` updates."""
        self.step, self.began = step, time.perf_counter()
        self.documents: list[int] = []  # lengths in tokens of those that this rank has met

    def so_far(self, step: int) -> tuple[int, float]:
        """Updates and seconds since the lap began; `step` updates are done now."""
        return step - self.step, time.perf_counter() - self.began


class Metrics:
    """The main rank's record of a run. Use as a context manager."""

    def __init__(self, config: RunConfig, step: int | None, wandb_id: str | None):
        """Continue the record behind `step` updates, or begin it (None); lines of lost updates are dropped."""
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
        self._track(lambda sink: sink.close())

    @property
    def wandb_id(self) -> str | None:
        """The wandb run that a resume continues."""
        return next((sink.id for sink in self.sinks if isinstance(sink, WandbSink)), None)

    def record(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Write one line of figures (`step` among them) everywhere; `eta_s`: seconds to the end of the run.

        Perplexities are added.

        Raises:
            RunError: another start of the run holds it now.
        """
        lease.check(self.folder)
        figures = {**figures, **_perplexities(figures)}
        self.figures.add(figures)
        incidents.flush(self.folder)
        tracked = {name: value for name, value in figures.items() if name != "step"}
        self._track(lambda sink: sink.log(int(figures["step"]), tracked))
        if "val_loss" in figures:
            console.print(f"step {figures['step']:>6,}  validation loss {figures['val_loss']:.4f}")
        else:
            self.progress.show(figures, eta_s)

    def record_layers(self, step: int, figures: LayerFigures, documents: Sequence[int]) -> None:
        """Write a line of what each layer does, and how the model's FLOPs divide among its parts.

        `documents`: lengths, in tokens, of those that the main rank trained on in this update.
        """
        flops = update_flops(self.model, documents)
        shares = {part: round(count / sum(flops.values()), 6) for part, count in flops.items() if count}
        self.layers.add({"step": step, **figures._asdict(), "flop_share": shares})
        tracked = _by_layer(figures) | {f"flop_share/{part}": share for part, share in shares.items()}
        self._track(lambda sink: sink.log(step, tracked))

    def _track(self, act: Callable[[Sink], None]) -> None:
        """Have each tracker do something; one that cannot write, as TensorBoard on a full disk, is done with."""
        for sink in [*self.sinks]:
            try:
                act(sink)
            except OSError as error:
                self.sinks.remove(sink)
                name = type(sink).__name__.removesuffix("Sink")
                console.print(f"{name}: {error.strerror}; figures go on without it", markup=False)


def _by_layer(figures: LayerFigures) -> dict[str, float | Histogram]:
    """The figures as trackers show them: a name for each layer's."""
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
    """exp(loss), of a token; a loss that no float can hold the exponential of counts as the largest that one can."""
    names = {"loss": "perplexity", "val_loss": "val_perplexity"}
    return {name: math.exp(min(figures[of], 700.0)) for of, name in names.items() if of in figures}
