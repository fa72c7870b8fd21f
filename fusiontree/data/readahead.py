"""Read-ahead threads instead of torch's DataLoader: the data side is free of torch, and seeking is O(1).

The threads make training steps ahead of time, in order; their expensive work releases the interpreter lock.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeAlias

from fusiontree.data.batch import Batch

AHEAD = 8  # minimum of batches per worker that are ready or in progress; the maximum is twice that, or two steps

BatchMaker: TypeAlias = Callable[[], Batch]


@dataclass(slots=True)
class Step:
    """One rank's batches of a step."""

    rows_consumed: int = 0  # by all ranks, after this step
    batches: list[Any] = field(default_factory=list)  # a Batch each, once the step is ready
    missing: int = 1  # batches still to be made
    ends_group: bool = False  # the consumer starts another group of steps after taking this one
    failure: BaseException | None = None  # raised instead of this step and of all later ones


class ReadAhead:
    """Makes steps ahead of their consumer.

    A consumer that returns from its device finds cold caches, where each Python call costs it microseconds. A ready
    step therefore costs it a single `take`, implemented in C. The workers keep the order and assemble the steps, and
    are woken once per group of steps.

    Args:
        steps: (rows consumed after the step, makers of its batches) of each step.
        workers: threads; 0: a step is made when it is taken.
        step_batches: batches per step.
    """

    def __init__(self, steps: Iterator[tuple[int, list[BatchMaker]]], workers: int, step_batches: int):
        self._steps = steps
        self._ready: SimpleQueue[Step] = SimpleQueue()
        self.take: Callable[[], Step] = self._ready.get if workers else self._make_now
        self._groups: SimpleQueue[None] = SimpleQueue()  # one entry per group of steps that may be started
        self._group_size = max(1, AHEAD * workers // step_batches)
        self._left_in_group = 0  # steps of the current group not started yet
        self._started: deque[Step] = deque()  # steps started but not ready, in order
        self._unmade: deque[tuple[Step, int, BatchMaker]] = deque()  # batches of the last of them, not yet in progress
        self._choose_lock = threading.Lock()  # guards the choice of the next batch
        self._deliver_lock = threading.Lock()  # guards the delivery of ready steps in order
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        self.start_group()
        self.start_group()
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """True if a step can be taken without waiting."""
        return not self._ready.empty()

    def start_group(self) -> None:
        """Allow the workers another group of steps; the consumer calls it after a step that `ends_group`."""
        self._groups.put(None)

    def fail(self, step: Step) -> None:
        """Raise the failure of a step, with its worker's traceback; every later `take` returns this step again."""
        assert step.failure is not None
        self._ready.put(step)
        raise step.failure

    def close(self) -> None:
        """Stop the workers."""
        self._closed = True
        for _ in self._threads:
            self.start_group()
        for thread in self._threads:
            thread.join()

    def _make_now(self) -> Step:
        while self._ready.empty():
            self._make_next()
        return self._ready.get()

    def _work(self) -> None:
        while self._make_next():
            pass

    def _make_next(self) -> bool:
        """Make the next batch; return False at the end of the steps and after `close`."""
        with self._choose_lock:
            if not self._unmade:
                self._start_step()
            if self._closed or not self._unmade:
                return False
            step, number, make = self._unmade.popleft()
        try:
            step.batches[number] = make()
        except BaseException as error:  # raised again in the consumer, see `fail`
            step.failure = error
        self._deliver(step)
        return True

    def _start_step(self) -> None:
        """Start the next step, if there is one, as soon as its group may be started."""
        if not self._left_in_group:
            self._groups.get()
            self._left_in_group = self._group_size
        self._left_in_group -= 1
        step = Step(ends_group=not self._left_in_group)
        self._started.append(step)
        try:
            step.rows_consumed, makers = next(self._steps)
        except BaseException as error:  # StopIteration at the end
            step.failure = error
            self._deliver(step)
            return
        step.missing, step.batches = len(makers), [None] * len(makers)
        self._unmade += [(step, number, make) for number, make in enumerate(makers)]

    def _deliver(self, step: Step) -> None:
        """Count one batch of `step` as made, then deliver the steps that are ready, up to one that failed."""
        with self._deliver_lock:
            step.missing -= 1
            while self._started and not self._started[0].missing:
                self._ready.put(self._started[0])
                if self._started[0].failure is not None:
                    return
                self._started.popleft()
