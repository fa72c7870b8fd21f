"""Prefetched steps arrive complete and in order, their number is bounded, and a failure keeps its position."""

import threading
import time
from collections.abc import Iterator

import pytest

from fusiontree.data.readahead import AHEAD, BatchMaker, ReadAhead

STEPS = 60


class Steps:
    """Steps of numbered batches; batch `bad_batch` fails, step `bad_step` cannot be started."""

    def __init__(self, step_batches: int, bad_batch: int | None = None, bad_step: int | None = None):
        self.step_batches, self.bad_batch, self.bad_step = step_batches, bad_batch, bad_step
        self.started = 0

    def __iter__(self) -> Iterator[tuple[int, list[BatchMaker]]]:
        for step in range(STEPS):
            if step == self.bad_step:
                raise ZeroDivisionError(f"step {step}")
            self.started += 1
            batches = range(step * self.step_batches, (step + 1) * self.step_batches)
            yield step + 1, [lambda number=number: self.make(number) for number in batches]

    def make(self, number: int) -> int:
        time.sleep(0.0005 if number % 3 == 0 else 0)  # later batches finish first
        if number == self.bad_batch:
            raise ZeroDivisionError(f"batch {number}")
        return number


def taken(ahead: ReadAhead) -> Iterator[tuple[int, list[int]]]:
    while True:
        step = ahead.take()
        if step.failure is not None:
            ahead.fail(step)
        if step.ends_group:
            ahead.start_group()
        yield step.rows_consumed, step.batches


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("step_batches", [1, 5, 40])
def test_steps_are_complete_and_in_order_and_few_start_ahead(workers: int, step_batches: int) -> None:
    steps = Steps(step_batches)
    ahead = ReadAhead(iter(steps), workers, step_batches)
    allowed = 2 * max(1, AHEAD * workers // step_batches)
    found = taken(ahead)
    for step in range(STEPS):
        batches = [*range(step * step_batches, (step + 1) * step_batches)]
        assert next(found) == (step + 1, batches)
        if workers and step == 2:
            time.sleep(0.1)  # the workers start as many steps as they may
        assert steps.started <= step + 1 + allowed
    with pytest.raises(StopIteration):
        ahead.fail(ahead.take())
    with pytest.raises(StopIteration):
        ahead.fail(ahead.take())
    ahead.close()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("fault", "words"), [({"bad_batch": 24}, "batch 24"), ({"bad_step": 12}, "step 12")])
def test_failure_comes_after_all_earlier_steps_and_ends_the_sequence(
    workers: int, fault: dict[str, int], words: str
) -> None:
    ahead = ReadAhead(iter(Steps(2, **fault)), workers, 2)
    found = taken(ahead)
    assert [next(found)[0] for _ in range(12)] == [*range(1, 13)]
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match=words):
            next(taken(ahead))
    ahead.close()


def test_ready_reports_whether_a_step_can_be_taken() -> None:
    gate = threading.Event()
    ahead = ReadAhead(iter([(1, [lambda: gate.wait(10)])]), 1, 1)
    assert not ahead.ready
    gate.set()
    assert ahead.take().batches == [True]
    deadline = time.monotonic() + 10
    while not ahead.ready and time.monotonic() < deadline:  # the end of the steps is a failed step
        time.sleep(0.001)
    assert ahead.ready
    ahead.close()


def test_close_stops_the_workers_although_no_step_was_taken() -> None:
    ahead = ReadAhead(iter(Steps(1)), 3, 1)
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)
