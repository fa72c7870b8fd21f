"""Worker processes that check files and encode documents; results arrive in submission order for any worker count."""

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
from data_tools.options import BuildOptions
from data_tools.readers import Record, Rejected, extract_text, find_fault, is_container
from fusiontree.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Encoded:
    """Encoded records."""

    tokens: np.ndarray  # of all documents, concatenated: uint16 or uint32
    lengths: list[int]  # tokens by record; 0: the record is not a document
    reasons: dict[int, str]  # by record that is not a document
    digests: np.ndarray  # by document, dtype S16; empty without deduplication


class Workers:
    """File checks and encoding, in this process or in a pool."""

    def __init__(self, encoder: Encoder, options: BuildOptions, pool: ProcessPoolExecutor | None):
        self.encoder = encoder
        self._options, self._pool = options, pool
        self._max_pending = 4 * options.workers if pool else 1

    def encode(self, records: Sequence[Record]) -> "Future[Encoded] | Encoded":
        """Start encoding records."""
        if self._pool is None:
            return _encode(self.encoder, self._options, records)
        return self._pool.submit(_encode_in_worker, records)

    def find_fault(self, file: TextFile) -> "Future[str] | str":
        """Start checking a file."""
        if self._pool is None or not is_container(file):
            return find_fault(file, self._options.input)
        return self._pool.submit(find_fault, file, self._options.input)

    def map_ordered(
        self, start: "Callable[[_Item], Future[_Result] | _Result]", items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Yield each item with its result, in order; the number of pending items is limited, which bounds memory."""
        pending: collections.deque[tuple[_Item, Future[_Result] | _Result]] = collections.deque()
        for item in items:
            pending.append((item, start(item)))
            if len(pending) >= self._max_pending:
                yield _wait(*pending.popleft())
        while pending:
            yield _wait(*pending.popleft())


def _wait(item: _Item, result: "Future[_Result] | _Result") -> tuple[_Item, _Result]:
    return item, result.result() if isinstance(result, Future) else result


@contextlib.contextmanager
def start_workers(tokenizer: Path, options: BuildOptions) -> Iterator[Workers]:
    """Start `options.workers` processes, which end with the block; a single worker is this process.

    Args:
        tokenizer: a Hugging Face tokenizer folder.
        options: of the build.

    Raises:
        UserError: see `Encoder`.
        RunError: a worker was killed.
    """
    with process_pool(options.workers, _load_encoder, tokenizer, options) as pool:
        yield Workers(Encoder(tokenizer, options.eos, options.encoder), options, pool)


@contextlib.contextmanager
def process_pool(
    count: int, initialize: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor | None]:
    """Start `count` processes that each call `initialize` and end with the block.

    Yields None if `count` is 1: the caller then works in its own process.

    Raises:
        RunError: a process was killed.
    """
    if count == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = _Pool(count, context, initializer=_start_process, initargs=(initialize, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise RunError("a worker process was killed, possibly for lack of memory; lower --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """Pool whose processes never receive SIGINT, which a terminal sends to the complete group; the parent ends them."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> "Future[_Result]":
        """Submit a call, with SIGINT blocked in any process that this starts.

        The processes inherit the blocked signal: a handler that they installed themselves would come too late.
        Signals that arrive in the parent meanwhile are raised afterwards, or a process could be started without being
        registered in the pool.
        """
        received: list[int] = []
        interrupts = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in interrupts}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if received:
                signal.raise_signal(received[0])


def _start_process(initialize: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initialize:
        initialize(*arguments)


def _exit_with_parent() -> None:
    """End this worker when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(encoder: Encoder, options: BuildOptions, records: Sequence[Record]) -> Encoded:
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    reasons: dict[int, str] = {}
    digests: list[bytes] = []
    for number, record in enumerate(records):
        try:
            text = extract_text(record, options.input)
        except Rejected as rejected:
            reasons[number] = str(rejected)
            lengths.append(0)
            continue
        if not arrays:
            encoder.audit(text)
        arrays.append(encoder.encode(text))
        lengths.append(len(arrays[-1]))
        if options.dedup:
            digests.append(digest(text))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
    return Encoded(tokens, lengths, reasons, np.array(digests, DIGEST))


_worker: tuple[Encoder, BuildOptions]  # set in worker processes only


def _load_encoder(tokenizer: Path, options: BuildOptions) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    _worker = Encoder(tokenizer, options.eos, options.encoder), options


def _encode_in_worker(records: Sequence[Record]) -> Encoded:
    return _encode(*_worker, records)
