"""Benchmark of the data loader, compared with webdataset's own pipeline on the same shards."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.console import progress_bar
from fusiontree.data import segments
from fusiontree.data.batch import Batch, collate
from fusiontree.data.format import Dataset
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream, single_source_recipe
from fusiontree.paths import is_address

REPEATS = 5  # measurements per figure
SECONDS = 1.0  # approximate duration of one measurement
CONSUMER = 5_000_000  # tokens/s; a GPU trains a model of a billion parameters on fewer
WORKERS = 2
MEMORY_BATCHES = 10_000
LATE_STEP = 1_000_000_000  # a step beyond the end of any run


def bench_loader(folder: Path | str, seq_len: int | None = None, rows: int = 1) -> dict[str, Any]:
    """Measure the loader on a dataset, its files in the page cache, checksums on.

    Rates are tokens per second of one thread's CPU time, which other load on the machine hardly changes; each is the
    median of five. Shares are means of five, because waiting is rare.

    Args:
        folder: the dataset, or its address; its rows are fetched into the default cache on demand.
        seq_len: tokens per training row; None: the stored row's length.
        rows: training rows per batch.

    Returns:
        The settings measured, and:
        first_batch_at_step_0_seconds, first_batch_at_step_1000000000_seconds: wall time from opening the dataset to
        the first batch of a run that resumes at this step, with two workers.
        rows_tokens_per_s: reading and verifying rows.
        batches_tokens_per_s: complete training batches, in order.
        webdataset_rows_tokens_per_s, webdataset_batches_tokens_per_s: webdataset's pipeline, without verification and
        without a resumable order; absent for an address.
        waiting_share: share of a consumer's time in calls of `next` whose batch was not ready, with two workers.
        next_share: share of its time in all calls of `next`, mostly cache misses on code and data.
        next_floor: the same for an iterator that does nothing, which is the cost of measuring.
        memory_bytes: resident bytes of the process, by number of batches made.

    Raises:
        UserError: there is no dataset, or `seq_len` does not divide its rows.
    """
    sources = Sources({"": Dataset(folder)})
    length = seq_len or sources.row_len
    stream = TrainStream(sources, single_source_recipe(0, length * rows, length), rows)
    measures: dict[str, Callable[[], Iterator[int]]] = {
        "rows_tokens_per_s": lambda: _rows(sources),
        "batches_tokens_per_s": lambda: (batch.labels.size for batches in stream for batch in batches),
    }
    if not is_address(folder):  # the cache of an address has single rows, which webdataset cannot read
        measures |= {
            "webdataset_rows_tokens_per_s": lambda: _webdataset_rows(sources),
            "webdataset_batches_tokens_per_s": lambda: _webdataset_batches(sources, length, rows),
        }
    figures: dict[str, Any] = {"data": str(folder), "seq_len": length, "rows_per_batch": rows}
    with progress_bar() as bar:
        task = bar.add_task("bench loader", total=len(measures) + 3, note="first batch")
        for step in (0, LATE_STEP):
            seconds = [_first_batch(folder, length, rows, step) for _ in range(REPEATS)]
            figures[f"first_batch_at_step_{step}_seconds"] = statistics.median(seconds)
        bar.advance(task)
        for name, make in measures.items():
            bar.update(task, note=name)
            figures[name] = statistics.median(_rate(make()) for _ in range(REPEATS))
            bar.advance(task)
        bar.update(task, note="waiting")
        figures |= _waiting(sources, length, rows)
        bar.update(task, advance=1, note="memory")
        figures["memory_bytes"] = _memory(sources, length, rows)
        bar.advance(task)
    return figures | {"consumer_tokens_per_s": CONSUMER, "workers": WORKERS, "repeats": REPEATS}


def _first_batch(folder: Path | str, seq_len: int, rows: int, step: int) -> float:
    """Return the seconds from opening the dataset to the first batch of a run that resumes at `step`."""
    started = time.perf_counter()
    stream = TrainStream(
        Sources({"": Dataset(folder)}), single_source_recipe(0, seq_len * rows, seq_len), rows, workers=WORKERS
    )
    stream.seek(step * rows)
    next(stream)
    spent = time.perf_counter() - started
    stream.close()
    return spent


def _rate(counts: Iterator[int]) -> float:
    """Return tokens per second of CPU time; the first count is the warmup."""
    next(counts)
    tokens, started, deadline = 0, time.thread_time(), time.perf_counter() + SECONDS
    for count in counts:
        tokens += count
        if time.perf_counter() > deadline:
            break
    return tokens / (time.thread_time() - started)


def _rows(sources: Sources) -> Iterator[int]:
    while True:
        for row in range(sources.datasets[0].num_rows):
            yield len(sources.read(0, row)[0])


def _webdataset_samples(sources: Sources) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def streams() -> Iterator[dict[str, Any]]:  # webdataset would cut a path at a '?' or '#', as it does an address
        for shard in sources.datasets[0].shards:
            with open(shard.path, "rb") as stream:
                yield {"url": str(shard.path), "stream": stream}

    decode, select = webdataset.decode(), webdataset.to_tuple("tok.npy", "ends.npy")
    while True:
        yield from select(decode(group_by_keys(tar_file_expander(streams()))))


def _webdataset_rows(sources: Sources) -> Iterator[int]:
    for tokens, _ in _webdataset_samples(sources):
        yield tokens.size


def _webdataset_batches(sources: Sources, seq_len: int, rows: int) -> Iterator[int]:
    """Cut and collate webdataset's samples as `TrainStream` does, in disk order."""
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, ends in _webdataset_samples(sources):
        for row, row_ends in zip(tokens, ends, strict=True):
            cut_ends = segments.cut(segments.without_fill(row_ends), seq_len)
            for cut in zip(row.reshape(-1, seq_len), cut_ends, strict=True):
                pending.append(cut)
                if len(pending) == rows:
                    batch = collate(np.stack([cut for cut, _ in pending]), [ends for _, ends in pending])
                    pending = []
                    yield batch.labels.size


def _waiting(sources: Sources, seq_len: int, rows: int) -> dict[str, float]:
    """Measure the shares of a consumer's time spent in `next`: waiting, in total, and for an iterator without work."""
    stream = TrainStream(sources, single_source_recipe(0, seq_len * rows, seq_len), rows, workers=WORKERS)
    next(stream)
    measures: dict[str, Callable[[], float]] = {
        "waiting_share": lambda: _share_in_next(stream, seq_len * rows, counts=lambda: not stream.ready),
        "next_share": lambda: _share_in_next(stream, seq_len * rows),
        "next_floor": lambda: _share_in_next(itertools.repeat([]), seq_len * rows),
    }
    figures = {name: statistics.fmean(measure() for _ in range(REPEATS)) for name, measure in measures.items()}
    stream.close()
    return figures


def _share_in_next(steps: Iterator[list[Batch]], step_tokens: int, counts: Callable[[], bool] = lambda: True) -> float:
    """Return the share of its time that a consumer of CONSUMER tokens/s spends in calls of `next`.

    Args:
        steps: iterator of a step's batches.
        step_tokens: tokens per step.
        counts: evaluated before each call; whether the call counts.
    """
    spent, started = 0.0, time.perf_counter()
    while time.perf_counter() < started + SECONDS:
        counted, asked = counts(), time.perf_counter()
        batches = next(steps)
        spent += counted * (time.perf_counter() - asked)
        time.sleep(step_tokens / CONSUMER)  # like a consumer that waits for its device
        del batches  # free the memory outside the measured calls
    return spent / (time.perf_counter() - started)


def _memory(sources: Sources, seq_len: int, rows: int) -> dict[str, int]:
    """Return the resident bytes of the process after a tenth of MEMORY_BATCHES and after all."""
    stream = TrainStream(sources, single_source_recipe(0, seq_len * rows, seq_len), rows, workers=WORKERS)
    found = {}
    for number in range(1, MEMORY_BATCHES + 1):
        next(stream)
        if number in (MEMORY_BATCHES // 10, MEMORY_BATCHES):
            found[f"after_{number}_batches"] = _resident()
    stream.close()
    return found


def _resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
