"""Threads make steps ahead in their order: never too many, never too few to go on, and a failure stays where it was."""

import threading
import time
from collections.abc import Iterator

import pytest

from fusiontree.data.readahead import AHEAD, Make, ReadAhead

STEPS = 60


class Steps:
    """Steps of numbered batches; a batch in `fatal` fails, step number `cut` cannot be begun."""

    def __init__(self, step_batches: int, fatal: int | None = None, cut: int | None = None):
        self.step_batches, self.fatal, self.cut = step_batches, fatal, cut
        self.begun = 0

    def __iter__(self) -> Iterator[tuple[int, list[Make]]]:
        for step in range(STEPS):
            if step == self.cut:
                raise ZeroDivisionError(f"step {step}")
            self.begun += 1
            batches = range(step * self.step_batches, (step + 1) * self.step_batches)
            yield step + 1, [lambda number=number: self.make(number) for number in batches]

    def make(self, number: int) -> int:
        time.sleep(0.002 if number % 3 == 0 else 0)  # so that later ones are done first
        if number == self.fatal:
            raise ZeroDivisionError(f"batch {number}")
        return number


def taken(ahead: ReadAhead) -> Iterator[tuple[int, list[int]]]:
    while True:
        step = ahead.take()
        if step.failure is not None:
            ahead.fail(step)
        if step.frees:
            ahead.free()
        yield step.rows_consumed, step.batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("step_batches", [1, 5, 40])
def test_steps_come_whole_and_in_order_and_few_are_begun_ahead(workers: int, step_batches: int) -> None:
    steps = Steps(step_batches)
    ahead = ReadAhead(iter(steps), workers, step_batches)
    allowed = 2 * max(1, AHEAD * workers // step_batches)
    found = taken(ahead)
    for step in range(STEPS):
        batches = [*range(step * step_batches, (step + 1) * step_batches)]
        assert next(found) == (step + 1, batches)
        if workers and step == 2:
            time.sleep(0.1)  # they go as far as they may
        assert steps.begun <= step + 1 + allowed
    with pytest.raises(StopIteration):
        ahead.fail(ahead.take())
    with pytest.raises(StopIteration):
        ahead.fail(ahead.take())
    ahead.close()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("fault", "words"), [({"fatal": 24}, "batch 24"), ({"cut": 12}, "step 12")])
def test_a_failure_stands_behind_all_steps_before_it_and_before_all_others(
    workers: int, fault: dict[str, int], words: str
) -> None:
    ahead = ReadAhead(iter(Steps(2, **fault)), workers, 2)
    found = taken(ahead)
    assert [next(found)[0] for _ in range(12)] == [*range(1, 13)]
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match=words):
            next(taken(ahead))
    ahead.close()


def test_what_can_be_taken_at_once_is_known() -> None:
    gate = threading.Event()
    ahead = ReadAhead(iter([(1, [lambda: gate.wait(10)])]), 1, 1)
    assert not ahead.ready
    gate.set()
    assert ahead.take().batches == [True]
    deadline = time.monotonic() + 10
    while not ahead.ready and time.monotonic() < deadline:  # the end, which is a step that failed
        time.sleep(0.001)
    assert ahead.ready
    ahead.close()


def test_workers_end_though_nothing_was_taken() -> None:
    ahead = ReadAhead(iter(Steps(1)), 3, 1)
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)
