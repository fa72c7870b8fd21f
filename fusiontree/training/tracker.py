"""Trackers on threads of their own: a slow, failing or hanging tracker neither delays nor ends a run. Free of torch."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from fusiontree.config import RunConfig
from fusiontree.console import console
from fusiontree.errors import typed_cause
from fusiontree.training.sinks import Histogram, Sink, TensorBoardSink, WandbSink

MAX_QUEUED = 10_000  # updates; a tracker further behind is dropped, which bounds the memory
END_SECONDS = 60.0  # limit of the wait for the trackers at the end of a run; wandb may still be connecting then
STOP_SECONDS = 10.0  # the same after a failure or a signal, when a scheduler is about to kill the job

log = logging.getLogger(__name__)


class Tracker:
    """A sink and the thread that opens, feeds and closes it.

    The first error of the sink is printed in one line, with its traceback in the rank's log, and drops the sink.
    """

    def __init__(self, sink: Sink):
        self.sink = sink
        self._queue: queue.Queue[tuple[int, Mapping[str, float | Histogram]] | None] = queue.Queue(MAX_QUEUED)
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._feed, name=sink.name, daemon=True)  # a hang cannot delay the exit
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float | Histogram]) -> None:
        """Queue figures of the run after `step` updates."""
        self._put((step, figures))

    def end(self) -> None:
        """Ask the thread to close the sink after the queued figures."""
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread until `deadline` (of `time.monotonic`), unless the sink is dropped."""
        while self._thread.is_alive() and not self._dropped.is_set():
            if time.monotonic() > deadline:
                self._drop("it has not finished in time, so its record may lack the last figures")
            self._thread.join(0.05)

    def _put(self, item: tuple[int, Mapping[str, float | Histogram]] | None) -> None:
        if self._dropped.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop(f"it is {MAX_QUEUED:,} updates behind; no more metrics are sent to it")

    def _feed(self) -> None:
        try:
            self.sink.start()
            while (item := self._queue.get()) is not None and not self._dropped.is_set():
                self.sink.log(*item)
            self.sink.close()
        except (Exception, SystemExit) as error:
            log.warning("%s failed", self.sink.name, exc_info=True)
            self._drop(f"{typed_cause(error)}; no more metrics are sent to it")
            with contextlib.suppress(Exception, SystemExit):
                self.sink.close()

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            console.print(f"{self.sink.name}: {reason}")


def open_trackers(config: RunConfig, step: int | None, wandb_id: str | None) -> list[Tracker]:
    """Start the configured trackers; print one line for each whose package is missing or broken.

    Args:
        config: the run.
        step: updates done before a resume; None for a new run.
        wandb_id: the id of the run at wandb.
    """
    sinks: dict[str, tuple[bool, Callable[[], Sink]]] = {
        "wandb": (config.logging.wandb, lambda: WandbSink(config, wandb_id)),
        "tensorboard": (config.logging.tensorboard, lambda: TensorBoardSink(config, step)),
    }
    trackers = []
    for package, (enabled, make) in sinks.items():
        try:
            # imported in this thread: imports of two threads can see each other's modules half initialized
            trackers += [Tracker(make())] if enabled else []
        except Exception as error:
            reason = f"cannot be imported ({typed_cause(error)})"
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                reason = "is not installed"
            hint = f"pip install 'fusiontree[{package}]'"
            console.print(f"{package} {reason}, so no metrics are sent to it; install it: {hint}")
    return trackers


def close_trackers(trackers: Sequence[Tracker], seconds: float) -> None:
    """Close all trackers; wait at most `seconds` for their queued figures."""
    for tracker in trackers:
        tracker.end()
    deadline = time.monotonic() + seconds
    for tracker in trackers:
        tracker.join(deadline)
