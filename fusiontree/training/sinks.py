"""Clients of the trackers for a run's figures, wandb and TensorBoard; `tracker.py` runs them on threads."""

import functools
import logging
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.errors import typed_cause

_PROJECT = "fusiontree"
_INIT_SECONDS = 30.0  # limit of wandb's attempts to reach its server, after which it records offline

log = logging.getLogger(__name__)


class Histogram(NamedTuple):
    """Counts of values between neighbouring edges."""

    counts: Sequence[int]  # [bins]
    edges: Sequence[float]  # [bins + 1], ascending


class Sink(Protocol):
    """A tracker's client. It groups names by their prefix before a slash.

    Its constructor only imports the package. The other methods may block and raise anything: `Tracker` calls them on a
    thread of their own.
    """

    name: str

    def start(self) -> None:
        """Open the record."""

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Send figures of the run after `step` updates."""

    def close(self) -> None:
        """Write buffered figures and close."""


def new_run_id() -> str:
    """Return WANDB_RUN_ID, if it is a valid id, or draw an id: checkpoints store it before wandb has started."""
    wanted = os.environ.get("WANDB_RUN_ID", "")
    return wanted if re.fullmatch(r"[\w-]{1,128}", wanted) else secrets.token_hex(4)


class WandbSink:
    """A wandb run: online with an API key, else offline, for `wandb sync`; also offline if it cannot start online."""

    name = "wandb"

    def __init__(self, config: RunConfig, run_id: str | None):
        """Prepare to continue the wandb run `run_id`, or to start it; None lets wandb choose an id."""
        import wandb

        self._wandb: Any = wandb
        self._config, self._run_id = config, run_id
        self._run: Any = None

    def start(self) -> None:
        """Start the wandb run, see `Sink`; print one line if it is recorded offline for a failure."""
        place = {"project": os.environ.get("WANDB_PROJECT") or _PROJECT, "entity": os.environ.get("WANDB_ENTITY")}
        try:
            self._run = self._init(_mode(self._wandb), place)
        except (Exception, SystemExit) as error:
            folder = self._config.run_dir / "wandb"
            log.warning("wandb cannot start", exc_info=True)
            console.print(f"wandb: {typed_cause(error)}; recording offline in {folder}, for `wandb sync`")
            self._run = self._start_offline(place)
        # wandb's own step cannot decrease: it would drop the steps that a resumed run repeats
        self._run.define_metric("*", step_metric="step")

    def _start_offline(self, place: dict[str, str | None]) -> Any:
        """Start after a failure, with a new service and without wandb's variables, one of which may be the cause."""
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        self._wandb.teardown()  # the failed start still holds the run's id
        try:
            return self._init("offline", place)
        except Exception:  # wandb rejects the name of the project or the entity
            self._wandb.teardown()
            return self._init("offline", {"project": _PROJECT})

    def _init(self, mode: str, place: dict[str, str | None]) -> Any:
        limits = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _INIT_SECONDS}
        settings = self._wandb.Settings(silent=True, **limits)
        self._wandb.setup(settings=settings)
        return self._wandb.init(
            **place,
            name=self._config.name,
            id=self._run_id,
            resume="allow",
            dir=self._config.run_dir,
            mode=mode,
            config=self._config.model_dump(mode="json"),
            settings=settings,
        )

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Send figures, see `Sink`."""
        values = {name: self._value(figure) for name, figure in figures.items()}
        self._run.log({"step": step, **values})

    def _value(self, figure: float | Histogram) -> Any:
        if isinstance(figure, Histogram):
            return self._wandb.Histogram(np_histogram=(list(figure.counts), list(figure.edges)))
        return figure

    def close(self) -> None:
        """Close, see `Sink`."""
        if self._run is not None:
            self._run.finish()


def _mode(wandb: Any) -> str:
    """Return wandb's mode: that of WANDB_MODE in any case, else online with credentials and offline without."""
    wanted = os.environ.get("WANDB_MODE", "").strip().lower()
    if wanted:
        os.environ["WANDB_MODE"] = wanted  # wandb reads it too, and rejects capitals
        return wanted
    wandb.setup(settings=wandb.Settings(silent=True))  # else the next line prints a warning
    keys = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE"), wandb.api.api_key)
    return "online" if any(keys) else "offline"


class TensorBoardSink:
    """Event files in the run's folder, for ``tensorboard --logdir runs``."""

    name = "TensorBoard"

    def __init__(self, config: RunConfig, step: int | None):
        """Prepare to continue after `step` updates, or to start (None)."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if step is None else step + 1  # the steps that a resumed run repeats replace the old ones
        self._open = functools.partial(SummaryWriter, str(config.run_dir / "tensorboard"), purge_step=purge)
        self._writer: Any = None

    def start(self) -> None:
        """Create an event file, see `Sink`."""
        threading.excepthook = _log_tensorboards_exceptions
        self._writer = self._open()

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
        if self._writer is not None:
            self._writer.close()


def _log_tensorboards_exceptions(args: Any) -> None:
    """Log the exception that ends TensorBoard's writing thread, which the next call of the writer raises again."""
    if type(args.thread).__module__.startswith("tensorboard."):
        log.warning("TensorBoard's thread ended", exc_info=args.exc_value)
    else:
        threading.__excepthook__(args)
