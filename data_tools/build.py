"""Text to packed shards: tokenised in parallel, packed and written in one order whatever the number of workers."""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_tools.sources import Document, find_documents
from data_tools.tokenizer import TOKENIZER_FILES, load_tokenizer
from fusiontree.console import progress_bar
from fusiontree.data.format import MANIFEST, SPLITS, Manifest, TokenizerInfo, token_dtype, write_split
from fusiontree.data.packing import check_row_len, pack
from fusiontree.errors import RunError, UserError
from fusiontree.files import refuse_existing, staged_folder

SOURCE = "default"
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1 << 20, 256  # of text given to a worker at a time
_Encoder = Callable[[Iterable[list[Document]]], Iterator[tuple[list[Document], list[np.ndarray]]]]


def build(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    holdout: float = 0.02,
    workers: int = 1,
    row_len: int = 32768,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build a dataset folder from text; the same documents give the same bytes, for any number of workers.

    Args:
        inputs: files or folders of UTF-8 text, see `find_documents`.
        tokenizer: a Hugging Face tokenizer folder; its files are copied into OUTPUT/tokenizer.
        output: the dataset folder to make; it appears whole, or not at all.
        holdout: share of the documents, the last ones in order, that make the validation split.
        workers: processes that tokenise.
        row_len: tokens per packed row.
        include: glob patterns a file must match.
        exclude: glob patterns it must not match.
        overwrite: replace what `output` holds.

    Returns the figures: documents, tokens (padding not counted), rows, padding (share of all tokens), cut_documents
    (longer than a row), bytes of the shards, seconds, skipped inputs.

    Raises:
        UserError: a mistake in the arguments or inputs.
        RunError: a worker died, or an input changed meanwhile.
    """
    started = time.perf_counter()
    if not 0 <= holdout < 1:
        raise UserError(f"holdout {holdout} is not a share of the documents; give 0 or more and less than 1")
    if workers < 1:
        raise UserError(f"workers {workers} is too few; give at least 1")
    check_row_len(row_len)
    refuse_existing(output, overwrite, marker=MANIFEST)
    _, info = load_tokenizer(tokenizer)
    documents, skipped = find_documents(inputs, include, exclude)
    held_out = min(max(1, round(len(documents) * holdout)), len(documents) - 1) if holdout else 0
    trained_on = len(documents) - held_out
    parts = dict(zip(SPLITS, (documents[:trained_on], documents[trained_on:]), strict=True))
    skipped_entries = [dataclasses.asdict(entry) for entry in skipped]
    cut = 0

    with (
        staged_folder(output, overwrite, marker=MANIFEST) as folder,
        _encoder(tokenizer, workers) as encode,
        progress_bar() as bar,
    ):
        task = bar.add_task("build", total=len(documents), note="")

        def encoded(part: list[Document]) -> Iterator[tuple[str, np.ndarray]]:
            nonlocal cut
            for chunk, arrays in encode(_chunks(part)):
                for document, tokens in zip(chunk, arrays, strict=True):
                    cut += len(tokens) > row_len
                    yield document.id, tokens
                    bar.advance(task)

        splits = {
            split: write_split(folder, split, pack(encoded(part), row_len, info.pad_id), SOURCE)
            for split, part in parts.items()
        }
        manifest = Manifest(row_len, token_dtype(info.vocab_size).name, SOURCE, info, splits, skipped_entries)
        (folder / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / "tokenizer" / name)
        manifest.save(folder)
    totals = [manifest.totals(split) for split in SPLITS]
    tokens, rows = (sum(total[name] for total in totals) for name in ("tokens", "rows"))
    return {
        "documents": len(documents),
        "tokens": tokens,
        "rows": rows,
        "padding": 1 - tokens / (rows * row_len),
        "cut_documents": cut,
        "bytes": sum(total["bytes"] for total in totals),
        "seconds": time.perf_counter() - started,
        "skipped": skipped_entries,
    }


def _chunks(documents: list[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, enough of them to be worth a message to a worker."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(loaded: tuple[Tokenizer, TokenizerInfo], chunk: list[Document]) -> list[np.ndarray]:
    """The tokens of each document, the end-of-document token included."""
    tokenizer, info = loaded
    dtype = token_dtype(info.vocab_size)
    # one by one: a batch of several would start threads, and `workers` is what says how many cores to use
    encodings = (tokenizer.encode_batch_fast([document.text()], add_special_tokens=False)[0] for document in chunk)
    return [np.array([*encoding.ids, info.eos_id], dtype=dtype) for encoding in encodings]


@contextlib.contextmanager
def _encoder(folder: Path, workers: int) -> Iterator[_Encoder]:
    """A function that encodes chunks of documents, in `workers` processes that end with the block."""
    if workers == 1:
        loaded = load_tokenizer(folder)
        yield lambda chunks: ((chunk, _encode(loaded, chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder,))
    try:
        yield functools.partial(_in_order, pool, 4 * workers)
    except BrokenProcessPool:
        raise RunError("a tokenising worker was killed, perhaps for want of memory; run with fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, ahead: int, chunks: Iterable[list[Document]]
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Each chunk and its tokens, in the order given; only `ahead` chunks are under way, which bounds memory."""
    pending: collections.deque[tuple[list[Document], Future[list[np.ndarray]]]] = collections.deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
        if len(pending) == ahead:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


_loaded: tuple[Tokenizer, TokenizerInfo]  # a worker's


def _start_worker(folder: Path) -> None:
    global _loaded
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _loaded = load_tokenizer(folder)


def _follow_parent() -> None:
    """End this worker when its parent is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: list[Document]) -> list[np.ndarray]:
    return _encode(_loaded, chunk)
