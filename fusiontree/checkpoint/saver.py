"""Saving while training goes on: a copy of everything at once, and a thread that writes it behind.

All files are hashed as they are written, read back and compared; only then does the folder get its name, `latest`
names it, and older checkpoints go. The ranks' threads talk over a process group of their own.
"""

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
from fusiontree.errors import RunError
from fusiontree.files import write_atomic
from fusiontree.run import incidents, lease
from fusiontree.run.folder import GATES_FILE, STATE_FILE, checkpoint_path, list_checkpoints, step_of
from fusiontree.zero.snapshot import snapshot

log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which checkpoints stay."""

    keep_last: int  # so many, the newest
    keep_every: int = 0  # and for ever those of a step that is a multiple of this; 0: none


class Saver:
    """Writes the checkpoints of a run; all ranks make one and call it together."""

    def __init__(self, engine: Any, world: World, run_dir: Path, retention: Retention, timeout_seconds: float):
        """`timeout_seconds`: how long a rank's thread waits for the others, which may still write or verify."""
        self.engine, self.world, self.run_dir, self.retention = engine, world, run_dir, retention
        self.waited = 0.0  # seconds for which training has stood still to take copies
        self._group = collectives.side_group(timeout_seconds)
        self._start = collectives.from_main(lease.ME, self._group)
        self._seconds: float | None = None  # of the newest checkpoint, until `figures` has told
        self._thread: threading.Thread | None = None
        self._failure: str | None = None  # of the last save, when its thread has ended
        self._error: Exception | None = None  # that a thread met and did not expect

    def save(self, state: Mapping[str, Any], texts: Mapping[str, str], gates: Tensor) -> None:
        """Write a checkpoint of the engine as it is now, behind; the one before is waited for.

        That it could not be written is said, recorded and, if no other save follows, raised by `finish`.

        Args:
            state: what a resume needs to know, as JSON; its step names the checkpoint.
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
        """How long the newest checkpoint took from its copy to its name, in seconds; told once."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"save_seconds": seconds}

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            RunError: the last checkpoint could not be written.
        """
        self.wait()
        if self._failure is not None:
            raise RunError(f"{self._failure}; free disk space and start again")

    def wait(self) -> None:
        """Wait until nothing is being written, whether it could be or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _work(self, final: Path, step: int, own: dict[str, Any], rest: Mapping[str, bytes], since: float) -> None:
        try:
            error = self._write(final, own, rest)
        except Exception as lost:  # the training thread's to raise
            self._error = lost
            return
        if error is None:
            self._seconds = time.perf_counter() - since
        self._failure = None if error is None else f"checkpoint {final} could not be written: {_reason(error)}"
        if error is not None and not isinstance(error, OSError):
            self._error = RunError(f"{self._failure}; see the logs in the run's folder")
        elif self._failure is not None and self.world.is_main:
            console.print(f"{self._failure}; training goes on and tries again at the next")
            incidents.record(self.run_dir, "save_failed", step, self._failure)

    def _write(self, final: Path, own: dict[str, Any], rest: Mapping[str, bytes]) -> Exception | None:
        """Write this rank's files and, on the main rank, seal them; what went wrong on any rank, on every rank."""
        partial = store.partial_of(final, self._start)
        hashes, error = _attempt(lambda: _write_files(partial, own))
        of_all = collectives.gather((hashes, error), self._group)
        error = next((error for _, error in of_all if error is not None), None)
        if self.world.is_main:
            if error is None:
                known = {name: sha256 for hashes, _ in of_all for name, sha256 in hashes.items()}
                _, error = _attempt(lambda: _seal(partial, final, known, rest, self.retention))
            if error is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return collectives.from_main(error, self._group)


def _attempt(write: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `write` returns, or why it does not: the other ranks must be told before anything is raised."""
    try:
        return write(), None
    except OSError as error:
        return None, error
    except Exception as error:
        log.exception("writing a checkpoint")
        return None, RuntimeError(_reason(error))  # which pickles, whatever it was


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


# --- the files -------------------------------------------------------------------------------------------------------


class _Hashing(RawIOBase):
    """Hashes what is written to a file through it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.hash = stream, hashlib.sha256()
        self.error: OSError | None = None  # that torch answers with one of its own

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise


def _write_files(folder: Path, files: dict[str, Any]) -> dict[str, str]:
    """Write `files`, emptying it, and make them durable; the sha256 of each."""
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
    """Add `rest` and the manifest; when all of it reads back as it was written, put it in place."""
    for name, content in rest.items():
        write_atomic(partial / name, content)
    hashes = {**hashes, **{name: hashlib.sha256(content).hexdigest() for name, content in rest.items()}}
    store.write_manifest(partial, hashes)
    if problems := store.verify(partial):
        raise OSError(f"read back, {problems[0]}")
    store.put_in_place(partial, final)
    _retain(final, retention)


def _retain(newest: Path, retention: Retention) -> None:
    """Remove the checkpoints that are too old, and those of later steps: damaged ones that training fell back from."""
    found = list_checkpoints(newest.parent)
    place = found.index(newest)
    old = found[: max(0, place + 1 - retention.keep_last)]
    for path in [*(path for path in old if not _stays(path, retention.keep_every)), *found[place + 1 :]]:
        shutil.rmtree(path)


def _stays(path: Path, every: int) -> bool:
    return every > 0 and step_of(path) % every == 0
