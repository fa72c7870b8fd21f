"""Asynchronous saver of our own, because DeepSpeed's writes no hashes and no atomic names.

Training waits for a copy to host memory, and a thread writes it to disk.

Files are hashed while they are written, then read back and compared. Only then is the folder renamed to its final name,
`latest` updated and the retention applied. The threads of all ranks coordinate over a process group of their own.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from fusiontree.checkpoint import store
from fusiontree.console import console
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, short_cause
from fusiontree.files import write_atomic
from fusiontree.run import incidents, lease
from fusiontree.run.folder import GATES_FILE, STATE_FILE, checkpoint_path, list_checkpoints, run_of, step_of
from fusiontree.zero.snapshot import snapshot

log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """The checkpoints to keep."""

    keep_last: int  # number of newest ones
    keep_every: int = 0  # keep those whose step is a multiple of this forever; 0: none


class Saver:
    """The writer of a run's checkpoints; every rank has one, and all calls are collective."""

    def __init__(self, engine: Any, world: World, run_dir: Path, retention: Retention, timeout_seconds: float):
        """Create the threads' process group.

        Args:
            engine: DeepSpeed's.
            world: the ranks.
            run_dir: the run's folder.
            retention: the checkpoints to keep.
            timeout_seconds: how long a rank's thread waits for the others, which may still write or verify.
        """
        self.engine, self.world, self.run_dir, self.retention = engine, world, run_dir, retention
        self.waited = 0.0  # seconds in which training waited for copies
        self._group = collectives.background_group(timeout_seconds)
        self._token = collectives.from_main(lease.TOKEN, self._group)
        self._seconds: float | None = None  # of the newest checkpoint, until `figures` returns it
        self._thread: threading.Thread | None = None
        self._failure: str | None = None  # of the last save, set when its thread ends
        self._error: Exception | None = None  # unexpected, in a thread

    def save(self, state: Mapping[str, Any], texts: Mapping[str, str], gates: Tensor) -> None:
        """Start to write a checkpoint of the engine's present state, after the previous one is written.

        A save that fails is printed and recorded. If no other save follows, `finish` raises it.

        Args:
            state: counters and fingerprints for a resume, as JSON; its `step` names the checkpoint.
            texts: further files by name.
            gates: running mean of the gates, fp32 [layers, H].
        """
        since = time.perf_counter()
        self.wait()
        copying = time.perf_counter()
        own = snapshot(self.engine)
        rest = {STATE_FILE: json.dumps(state, indent=1).encode()}
        rest |= {name: text.encode() for name, text in texts.items()}
        rest[GATES_FILE] = safetensors.torch.save({"mean": gates.cpu()})
        target = (checkpoint_path(self.run_dir, state["step"]), state["step"], own, rest, copying)
        self._thread = threading.Thread(target=self._work, args=target, name="saver", daemon=True)
        self._thread.start()
        self.waited += time.perf_counter() - since

    def figures(self) -> dict[str, float]:
        """Return the seconds from the copy of the newest checkpoint to its rename, in one call per checkpoint."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"save_seconds": seconds}

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            RunError: the last checkpoint could not be written.
        """
        self.wait()
        if self._failure is not None:
            raise RunError(f"{self._failure}; free disk space and start again")

    def wait(self) -> None:
        """Wait until the current save ends, successfully or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _work(self, final: Path, step: int, own: dict[str, Any], rest: Mapping[str, bytes], since: float) -> None:
        try:
            error = self._write(final, own, rest)
        except Exception as lost:  # raised by `wait`, in the training thread
            self._error = lost
            return
        if error is None:
            self._seconds = time.perf_counter() - since
        self._failure = None if error is None else f"checkpoint {final} could not be written: {short_cause(error)}"
        if error is not None and not isinstance(error, OSError):
            self._error = RunError(f"{self._failure}; see the logs in the run's folder")
        elif self._failure is not None and self.world.is_main:
            console.print(f"{self._failure}; training continues, and the next save tries again")
            incidents.record(self.run_dir, "save_failed", step, self._failure)

    def _write(self, final: Path, own: dict[str, Any], rest: Mapping[str, bytes]) -> Exception | None:
        """Write this rank's files and, on the main rank, seal them; return the error of any rank on every rank."""
        partial = store.partial_path(final, self._token)
        hashes, error = _attempt(lambda: _write_files(partial, own))
        gathered = collectives.gather((hashes, error), self._group)
        error = next((error for _, error in gathered if error is not None), None)
        if self.world.is_main:
            if error is None:
                all_hashes = {name: sha256 for hashes, _ in gathered for name, sha256 in hashes.items()}
                _, error = _attempt(lambda: _seal(partial, final, all_hashes, rest, self.retention))
            if error is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return collectives.from_main(error, self._group)


def _attempt(write: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result of `write`, or its error: the other ranks must have it before any rank raises."""
    try:
        return write(), None
    except OSError as error:
        return None, error
    except Exception as error:
        log.exception("writing a checkpoint")
        return None, RuntimeError(short_cause(error))  # `error` itself may not pickle, and `gather` pickles it


# --- the files -------------------------------------------------------------------------------------------------------


class _Hashing(RawIOBase):
    """A stream that hashes the data written through it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.hash = stream, hashlib.sha256()
        self.error: OSError | None = None  # `torch.save` raises a RuntimeError in its place

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise


def _write_files(folder: Path, files: dict[str, Any]) -> dict[str, str]:
    """Write and sync `files`, removing each from the dict to free its memory; return the sha256 by name."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name in list(files):
        with open(folder / name, "wb") as stream:
            hashing: Any = _Hashing(stream)
            try:
                torch.save(files.pop(name), hashing)
            except RuntimeError as error:
                raise hashing.error or error from None
            stream.flush()
            os.fsync(stream.fileno())
        hashes[name] = hashing.hash.hexdigest()
    return hashes


def _seal(
    partial: Path, final: Path, hashes: Mapping[str, str], rest: Mapping[str, bytes], retention: Retention
) -> None:
    """Add `rest` and the manifest, verify all files by reading them back, and put the checkpoint in place."""
    for name, content in rest.items():
        write_atomic(partial / name, content)
    hashes = {**hashes, **{name: hashlib.sha256(content).hexdigest() for name, content in rest.items()}}
    store.write_manifest(partial, hashes)
    if problems := store.verify(partial):
        raise OSError(f"{problems[0]} when read back")  # training continues, as after a full disk
    store.put_in_place(partial, final)
    _retain(final, retention)


def _retain(newest: Path, retention: Retention) -> None:
    """Remove old checkpoints, and those of later steps than `newest`: damaged ones that the run skipped.

    A failed removal is recorded. It does not fail the save.

    Raises:
        RunError: another attempt at the run has the lease.
    """
    found = list_checkpoints(newest.parent)
    index = found.index(newest)
    old = found[: max(0, index + 1 - retention.keep_last)]
    for path in [*(path for path in old if not _is_kept(path, retention.keep_every)), *found[index + 1 :]]:
        try:
            store.remove(path)  # one that is being read is removed after a later save
        except OSError as error:
            _report_failed_removal(path, short_cause(error))


@functools.cache  # reported once, not after every save
def _report_failed_removal(checkpoint: Path, reason: str) -> None:
    message = f"checkpoint {checkpoint} could not be removed: {reason}; remove it by hand"
    console.print(message)
    incidents.record(run_of(checkpoint), "removal_failed", step_of(checkpoint), message)


def _is_kept(path: Path, every: int) -> bool:
    return every > 0 and step_of(path) % every == 0
