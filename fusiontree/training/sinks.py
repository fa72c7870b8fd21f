"""Trackers for a run's figures: wandb and TensorBoard, if configured and installed."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fusiontree.config import RunConfig
from fusiontree.console import console


class Histogram(NamedTuple):
    """Counts of values between neighbouring edges."""

    counts: Sequence[int]  # [bins]
    edges: Sequence[float]  # [bins + 1], ascending


class Sink(Protocol):
    """A tracker. It groups names by their prefix before a slash."""

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Send figures of the run after `step` updates."""

    def close(self) -> None:
        """Write buffered figures and close."""


class WandbSink:
    """A wandb run: online with an API key, else offline, for `wandb sync`."""

    def __init__(self, config: RunConfig, run_id: str | None):
        """Continue the wandb run `run_id`, or start one (None).

        Raises:
            ImportError: wandb is not installed.
        """
        import wandb

        has_key = "WANDB_API_KEY" in os.environ or wandb.api.api_key is not None
        mode: Any = os.environ.get("WANDB_MODE", "online" if has_key else "offline")
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project="fusiontree",
            name=config.name,
            id=run_id,
            resume="allow",
            dir=config.run_dir,
            mode=mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
        # wandb's own step cannot decrease: it would drop the steps that a resumed run repeats
        self._run.define_metric("*", step_metric="step")

    @property
    def id(self) -> str:
        """The id by which a resumed run continues this one."""
        return self._run.id

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Send figures, see `Sink`."""
        values = {name: self._value(figure) for name, figure in figures.items()}
        self._run.log({"step": step, **values})

    def _value(self, figure: float | Histogram) -> Any:
        if isinstance(figure, Histogram):
            return self._histogram(np_histogram=(list(figure.counts), list(figure.edges)))
        return figure

    def close(self) -> None:
        """Close, see `Sink`."""
        self._run.finish()


class TensorBoardSink:
    """Event files in the run's folder, for ``tensorboard --logdir runs``."""

    def __init__(self, config: RunConfig, step: int | None):
        """Continue after `step` updates, or start (None).

        Raises:
            ImportError: tensorboard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        purge = None if step is None else step + 1  # the steps that a resumed run repeats replace the old ones
        self._writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Send figures, see `Sink`."""
        for name, figure in figures.items():
            if isinstance(figure, Histogram):
                self._log_histogram(name, figure, step)
            else:
                self._writer.add_scalar(name, figure, step)

    def _log_histogram(self, name: str, figure: Histogram, step: int) -> None:
        middles = [(low + high) / 2 for low, high in zip(figure.edges, figure.edges[1:], strict=False)]
        pairs = list(zip(figure.counts, middles, strict=True))
        self._writer.add_histogram_raw(
            name,
            min=figure.edges[0],
            max=figure.edges[-1],
            num=sum(figure.counts),
            sum=sum(count * middle for count, middle in pairs),
            sum_squares=sum(count * middle**2 for count, middle in pairs),
            bucket_limits=list(figure.edges[1:]),
            bucket_counts=list(figure.counts),
            global_step=step,
        )

    def close(self) -> None:
        """Close, see `Sink`."""
        self._writer.close()


def open_sinks(config: RunConfig, step: int | None, wandb_id: str | None) -> list[Sink]:
    """Open the configured trackers; print one line for each that is not installed.

    Args:
        config: the run.
        step: updates done before a resume; None for a new run.
        wandb_id: the wandb run to continue.
    """
    wanted: dict[str, tuple[bool, Callable[[], Sink]]] = {
        "wandb": (config.logging.wandb, lambda: WandbSink(config, wandb_id)),
        "tensorboard": (config.logging.tensorboard, lambda: TensorBoardSink(config, step)),
    }
    sinks: list[Sink] = []
    for name, (enabled, make) in wanted.items():
        if not enabled:
            continue
        try:
            sinks.append(make())
        except ImportError:
            hint = f"pip install 'fusiontree[{name}]'"
            console.print(f"{name} is not installed, so no metrics are sent to it; install it: {hint}", markup=False)
    return sinks
