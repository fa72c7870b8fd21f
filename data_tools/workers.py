"""Processes that examine files and encode documents; results come in the order of the work, whatever their number."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_tools.duplicates import DIGEST, digest
from data_tools.encoding import Encoder
from data_tools.inputs import TextFile
from data_tools.readers import Reading, Record, Rejected, examine, is_sealed, text_of
from fusiontree.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Work:
    """What a worker has to know."""

    tokenizer: Path
    eos: str | None
    encoder: str
    reading: Reading
    digests: bool  # whether the documents' digests are wanted


@dataclass(frozen=True)
class Encoded:
    """What became of some records."""

    tokens: np.ndarray  # of all documents, one after another: uint16 or uint32
    lengths: list[int]  # tokens by record; 0: it is no document
    reasons: dict[int, str]  # by record, why it is none
    digests: np.ndarray  # by document, dtype S16; empty if not wanted


class Workers:
    """Does work in this process, or in a pool of several."""

    def __init__(self, work: Work, pool: ProcessPoolExecutor | None, ahead: int):
        self.encoder = Encoder(work.tokenizer, work.eos, work.encoder)
        self._work, self._pool, self._ahead = work, pool, ahead

    def encode(self, records: Sequence[Record]) -> "Future[Encoded] | Encoded":
        """Start to encode some records."""
        if self._pool is None:
            return _encode(self.encoder, self._work, records)
        return self._pool.submit(_encode_in_worker, records)

    def examine(self, file: TextFile) -> "Future[str] | str":
        """Start to examine a file."""
        if self._pool is None or not is_sealed(file):
            return examine(file, self._work.reading)
        return self._pool.submit(examine, file, self._work.reading)

    def in_order(
        self, start: "Callable[[_Item], Future[_Result] | _Result]", items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Each item and its result, in the order given; only so many are under way, which bounds memory."""
        pending: collections.deque[tuple[_Item, Future[_Result] | _Result]] = collections.deque()
        for item in items:
            pending.append((item, start(item)))
            if len(pending) >= self._ahead:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())


def _finished(item: _Item, result: "Future[_Result] | _Result") -> tuple[_Item, _Result]:
    return item, result.result() if isinstance(result, Future) else result


@contextlib.contextmanager
def start_workers(work: Work, number: int) -> Iterator[Workers]:
    """`number` workers, which end with the block; one works in this process.

    Raises:
        UserError: see `Encoder`.
        RunError: a worker was killed.
    """
    with process_pool(number, _load_encoder, work) as pool:
        yield Workers(work, pool, ahead=4 * number if pool else 1)


@contextlib.contextmanager
def process_pool(
    number: int, prepare: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor | None]:
    """`number` processes, each of which has called `prepare`; they end with the block. None for one: work in this one.

    Raises:
        RunError: a process was killed.
    """
    if number == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = _Pool(number, context, initializer=_start_process, initargs=(prepare, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise RunError("a worker was killed, perhaps for want of memory; run again with fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """A pool whose processes Ctrl-C, which reaches the whole group, never disturbs: the parent ends them."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> "Future[_Result]":
        """Start work. New processes inherit that the signal is blocked: they could not ignore it from the beginning.

        An interrupt meanwhile is held back, so that no process is started that the pool does not know.
        """
        came: list[int] = []
        interrupts = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in interrupts}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if came:
                signal.raise_signal(came[0])


def _start_process(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    if prepare:
        prepare(*arguments)


def _follow_parent() -> None:
    """End this worker when its parent is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(encoder: Encoder, work: Work, records: Sequence[Record]) -> Encoded:
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    reasons: dict[int, str] = {}
    digests: list[bytes] = []
    for number, record in enumerate(records):
        try:
            text = text_of(record, work.reading)
        except Rejected as rejected:
            reasons[number] = str(rejected)
            lengths.append(0)
            continue
        if not arrays:
            encoder.audit(text)
        arrays.append(encoder.encode(text))
        lengths.append(len(arrays[-1]))
        if work.digests:
            digests.append(digest(text))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
    return Encoded(tokens, lengths, reasons, np.array(digests, DIGEST))


_worker: tuple[Encoder, Work]  # a worker's


def _load_encoder(work: Work) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Encoder(work.tokenizer, work.eos, work.encoder), work


def _encode_in_worker(records: Sequence[Record]) -> Encoded:
    return _encode(*_worker, records)
