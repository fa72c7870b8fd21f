"""Steps of training made ahead by threads, in a known order: what takes their time releases the interpreter's lock."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeAlias

from fusiontree.data.batch import Batch

AHEAD = 8  # batches per worker that wait or are being made, at least; at most twice as many, or two steps

Make: TypeAlias = Callable[[], Batch]


@dataclass(slots=True)
class Step:
    """A rank's batches of a step."""

    rows_consumed: int = 0  # by all ranks together, when it is done
    batches: list[Any] = field(default_factory=list)  # a Batch each, once it is ready
    missing: int = 1  # batches still to be made
    frees: bool = False  # whether others may be begun when it is taken
    failure: BaseException | None = None  # instead of it, and of all behind it


class ReadAhead:
    """Makes steps ahead of their consumer.

    A consumer that comes back from its device finds cold caches, where every call of Python's costs it microseconds. So
    all that it does for a step that is ready is one `take`, written in C: the workers keep the order and put the steps
    together, and are woken once for many steps.

    Args:
        steps: of each step the rows consumed behind it, and what makes its batches.
        workers: threads; 0: a step is made when it is taken.
        step_batches: batches of a step.
    """

    def __init__(self, steps: Iterator[tuple[int, list[Make]]], workers: int, step_batches: int):
        self._steps = steps
        self._ready: SimpleQueue[Step] = SimpleQueue()
        self.take: Callable[[], Step] = self._ready.get if workers else self._make_now
        self._room: SimpleQueue[None] = SimpleQueue()  # an entry for each bunch of steps that may be begun
        self._bunch = max(1, AHEAD * workers // step_batches)
        self._allowed = 0  # steps of the bunch that may still be begun
        self._begun: deque[Step] = deque()  # and not ready, in order
        self._unmade: deque[tuple[Step, int, Make]] = deque()  # batches of the last of them that nobody has begun
        self._turn = threading.Lock()  # who holds it chooses what to make next
        self._order = threading.Lock()  # who holds it passes steps on
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        self.free()
        self.free()
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether a step can be taken without waiting for it."""
        return not self._ready.empty()

    def free(self) -> None:
        """Let a bunch of steps be begun: one that `frees` was taken."""
        self._room.put(None)

    def fail(self, step: Step) -> None:
        """Raise what stands instead of a step, as its worker raised it; the next one taken is that again."""
        assert step.failure is not None
        self._ready.put(step)
        raise step.failure

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for _ in self._threads:
            self.free()
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
        """Make the next batch, if there is one and it is still wanted."""
        with self._turn:
            if not self._unmade:
                self._begin()
            if self._closed or not self._unmade:
                return False
            step, number, make = self._unmade.popleft()
        try:
            step.batches[number] = make()
        except BaseException as error:  # the consumer's to handle, as below
            step.failure = error
        self._pass_on(step)
        return True

    def _begin(self) -> None:
        """Begin the next step, if there is one, when there is room for it."""
        if not self._allowed:
            self._room.get()
            self._allowed = self._bunch
        self._allowed -= 1
        step = Step(frees=not self._allowed)
        self._begun.append(step)
        try:
            step.rows_consumed, makes = next(self._steps)
        except BaseException as error:  # StopIteration at the end
            step.failure = error
            self._pass_on(step)
            return
        step.missing, step.batches = len(makes), [None] * len(makes)
        self._unmade += [(step, number, make) for number, make in enumerate(makes)]

    def _pass_on(self, step: Step) -> None:
        """Count what `step` was missing and has now; hand over the steps that are ready, up to one that failed."""
        with self._order:
            step.missing -= 1
            while self._begun and not self._begun[0].missing:
                self._ready.put(self._begun[0])
                if self._begun[0].failure is not None:
                    return
                self._begun.popleft()
