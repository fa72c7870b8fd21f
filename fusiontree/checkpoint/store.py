"""The checkpoints of a run: placement, verification, contents.

``checkpoints/step-N/`` contains DeepSpeed's files, ``state.json`` (counters and fingerprints for a resume),
``config.yaml``, ``gates.safetensors`` and ``manifest.json`` (sha256 of all others, written last). A checkpoint is read
only if every hash matches. ``checkpoints/latest`` names the newest. `fusiontree.checkpoint.saver` writes them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusiontree.checkpoint.tensor_files import TensorFiles, from_checkpoint
from fusiontree.console import console
from fusiontree.data.batch import BadRow
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.files import fsync_folder, write_atomic
from fusiontree.model.config import ModelConfig
from fusiontree.run import lease
from fusiontree.run.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    GATES_FILE,
    LATEST,
    MANIFEST_FILE,
    STATE_FILE,
    is_checkpoint,
    list_checkpoints,
    run_of,
    step_of,
)
from fusiontree.run.state_files import Count, DamagedError, Stored, read_stored
from fusiontree.zero import layout, reshard


class _Manifest(Stored):
    sha256: dict[str, str]


def _ordered(rows: tuple[int, int]) -> tuple[int, int]:
    if rows[0] > rows[1]:
        raise ValueError("must not end before it starts")
    return rows


_Rows = Annotated[tuple[Count, Count], AfterValidator(_ordered)]  # rows consumed before and after a range


class _Health(Stored):
    skipped: Count
    bad: list[_Rows]
    losses: list[float]


class _State(Stored):
    """All that training saves beside the tensors."""

    step: Count
    tokens: Count
    rows_consumed: Count
    world_size: Annotated[int, Field(ge=1, le=2**24)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    data_fingerprint: str
    tokenizer_fingerprint: str
    eos_id: Count
    pad_id: Count
    wandb_id: str | None
    left_out: list[_Rows]
    bad_rows: list[BadRow]
    health: _Health


def partial_path(final: Path, token: str) -> Path:
    """Return the folder in which the attempt with the lease `token` builds the checkpoint `final`."""
    return final.with_name(f".{final.name}.{token}.partial")


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, replacing an existing one, and update `latest`.

    Raises:
        RunError: another attempt at the run has the lease; this one is stale and must not write.
    """
    lease.check(run_of(final))
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # training has rolled back and reached this step again
        os.replace(final, old)
    os.replace(partial, final)
    fsync_folder(final.parent)
    write_atomic(final.parent / LATEST, final.name + "\n")
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Put checkpoints in `folder` that an interrupted save has replaced back, unless their successors verify."""
    for old in folder.glob(".step-*.old"):
        final = folder / old.name[1:].removesuffix(".old")
        if final.exists() and not verify(final):
            continue
        _discard(final)
        os.replace(old, final)


def tidy(folder: Path) -> None:
    """Remove the leftovers of interrupted saves and removals in `folder`; only the holder of the lease may do it."""
    for kind in ("old", "partial", "removed"):
        for path in folder.glob(f".step-*.{kind}"):
            _discard(path)
    for partial in folder.glob(".latest.partial-*"):
        partial.unlink()


def _discard(path: Path) -> None:
    """Remove a folder, or the link to one; what is not there or cannot be removed stays."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove(checkpoint: Path) -> bool:
    """Remove a checkpoint, unless another process is reading it; of a checkpoint that was moved, remove only the link.

    Returns:
        Whether the checkpoint is gone.

    Raises:
        RunError: another attempt at the run has the lease; it may be about to resume from this checkpoint.
        OSError: it cannot be removed.
    """
    with contextlib.ExitStack() as files:
        with contextlib.suppress(FileNotFoundError):  # damaged: no reader has pinned it
            manifest = files.enter_context(open(checkpoint / MANIFEST_FILE, "rb+"))
            try:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks
        lease.check(run_of(checkpoint))
        removed = checkpoint.with_name(f".{checkpoint.name}.{lease.TOKEN}.removed")
        os.replace(checkpoint, removed)  # at once, so that no one reads half a checkpoint
    _discard(removed)
    return True


@contextlib.contextmanager
def pinned(checkpoint: Path) -> Iterator[None]:
    """Keep other processes from removing `checkpoint` while the block reads it, on file systems with locks.

    Raises:
        RunError: another one has been put in its place meanwhile, after a rollback of the run.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError:  # `verify` reports it
        yield
        return
    with manifest:
        with contextlib.suppress(OSError):
            fcntl.flock(manifest, fcntl.LOCK_SH)
        yield
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(manifest.fileno()), path.stat()):
                raise RunError(f"checkpoint {checkpoint} was replaced while it was read; run the command again")


def load(engine: Any, world: World, checkpoint: Path, trust: bool) -> None:
    """Load weights and optimizer states of `checkpoint` into `engine`; a collective call.

    Each rank then compares the hash of one file, its own if the ranks are as many as at the save, with the manifest of
    the main rank. So what was loaded is what was verified, also on a host that mounts another disk at this path.

    Args:
        engine: DeepSpeed's.
        world: the ranks.
        checkpoint: its folder, verified by the main rank.
        trust: unpickle arbitrary objects in the files, which can run any code.

    Raises:
        RunError: a file or a part of a parameter is missing, or a file is not the verified one.
    """
    state = read_state(checkpoint)
    same = (state["zero_stage"], state["world_size"]) == (engine.zero_optimization_stage(), world.size)
    reshard.load(engine, checkpoint, state["zero_stage"], world.rank if same else None, trust)
    hashes: dict[str, str] = collectives.on_main(lambda: read_manifest(checkpoint))
    own = layout.file_of_rank(sorted(hashes), world.rank)
    place = None if sha256(checkpoint / own) == hashes[own] else f"rank {world.rank} on {os.uname().nodename}"
    if others := [place for place in collectives.gather(place) if place is not None]:
        raise RunError(
            f"{checkpoint} is not the checkpoint that rank 0 verified: {', '.join(others)}; mount one disk on all hosts"
        )


def refuse_code(checkpoint: Path) -> None:
    """Raise UserError if a file of `checkpoint` contains more than tensors and DeepSpeed's own plain objects.

    The values of tensors are not read.
    """
    read = layout.reader(values=False)
    for path in sorted(checkpoint.glob("*.pt")):
        read(path)


def newest(folder: Path, pins: contextlib.ExitStack | None = None) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint in `folder` that verifies, and a line on each newer one, which is damaged.

    Args:
        folder: the run's ``checkpoints/``.
        pins: keeps the checkpoint `pinned` until it is closed; None: it may be removed after the call.

    Raises:
        RunError: there are checkpoints, but none verifies.
    """
    damaged: dict[Path, str] = {}
    while left := [path for path in list_checkpoints(folder) if path not in damaged]:
        checkpoint = left[-1]
        with contextlib.ExitStack() as pin:
            pin.enter_context(pinned(checkpoint))
            problems = verify(checkpoint)
            if not problems:
                if pins is not None:
                    pins.push(pin.pop_all())
                return checkpoint, damaged
        if checkpoint.exists():  # else the run has removed it after the listing, because there is a newer one
            damaged[checkpoint] = f"checkpoint {checkpoint} is damaged and skipped: {problems[0]}"
    if damaged:
        line, *_ = damaged.values()
        raise RunError(f"no valid checkpoint under {folder} ({line}); restore one or remove the folder")
    return None, damaged


def resolve(source: Path, pins: contextlib.ExitStack) -> Path:
    """Return the checkpoint at `source`, or the newest one if it is a run's folder; it is verified.

    Args:
        source: the folder.
        pins: keeps the checkpoint `pinned` until it is closed.

    Raises:
        UserError: there is none.
        RunError: it does not verify.
    """
    source = source.resolve()
    if (source / STATE_FILE).exists() or is_checkpoint(source):
        pins.enter_context(pinned(source))
        if problems := verify(source):
            raise RunError(f"checkpoint {source} is damaged: {problems[0]}; restore it or use another one")
        return source
    if not source.is_dir():
        raise UserError(
            f"no run or checkpoint at {source}; give the folder of a run or of a checkpoint, e.g. runs/NAME"
        )
    found, damaged = newest(source / CHECKPOINTS, pins)
    for line in damaged.values():
        console.print(line)
    if found is None:
        raise UserError(f"{source} has no checkpoint; train first, or give another folder")
    return found


def verify(checkpoint: Path) -> list[str]:
    """Return a line on each file of `checkpoint` that is missing or damaged; none if it is complete."""
    try:
        files = read_manifest(checkpoint)
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except DamagedError as error:
        return [f"{MANIFEST_FILE} is damaged ({short_cause(error)})"]
    problems = []
    for name, expected in files.items():
        if not _is_file_name(name):
            problems.append(f"{name!r} is outside the checkpoint's folder")
        elif problem := _mismatch(checkpoint / name, expected):
            problems.append(f"{name} {problem}")
    required = (CONFIG_FILE, STATE_FILE, GATES_FILE)
    problems += (f"{name} is not in {MANIFEST_FILE}" for name in required if name not in files)
    if not problems:
        try:
            _parse_state(checkpoint)
        except DamagedError as error:
            problems.append(f"{STATE_FILE} is damaged ({short_cause(error)})")
    return problems


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) < 256


def _mismatch(path: Path, expected: str) -> str | None:
    """Return why the file at `path` is not the one with the sha256 `expected`, or None if it is."""
    if not path.is_file():
        return "is missing"
    try:
        return None if sha256(path) == expected else "does not match its sha256"
    except OSError as error:
        return f"cannot be read ({short_cause(error)})"


def read_manifest(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of every file of `checkpoint` by name.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedError: it is unreadable.
    """
    return read_stored(checkpoint / MANIFEST_FILE, _Manifest).sha256


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that `Saver.save` wrote.

    Raises:
        RunError: the file is damaged or lacks keys.
    """
    try:
        return _parse_state(checkpoint)
    except FileNotFoundError:
        reason = "missing"
    except DamagedError as error:
        reason = f"damaged ({short_cause(error)})"
    raise RunError(f"{checkpoint / STATE_FILE} is {reason}; restore the checkpoint or use another one")


def _parse_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state of `checkpoint`; raise DamagedError unless it is of the step that the folder's name states."""
    state = read_stored(checkpoint / STATE_FILE, _State).model_dump()
    if is_checkpoint(checkpoint) and state["step"] != step_of(checkpoint):
        raise DamagedError(f"it is of step {state['step']}")
    return state


def read_gates(checkpoint: Path, model: ModelConfig | None = None) -> Tensor:
    """Return the running mean of the gates, fp32 [layers, H].

    Args:
        checkpoint: its folder.
        model: the model that the gates must fit; None: any.

    Raises:
        RunError: the file is damaged, or of another model.
    """
    path = checkpoint / GATES_FILE
    try:
        gates = load_file(path)["mean"]
    except (SafetensorError, OSError, KeyError):
        raise RunError(f"{path} is missing or damaged; restore the checkpoint or use another one") from None
    if gates.dtype != torch.float32 or gates.dim() != 2 or not gates.isfinite().all():
        raise RunError(f"{path} has no mean of gates; restore the checkpoint or use another one")
    if model is not None and gates.shape != (model.num_layers, model.hidden_size):
        raise RunError(f"{path} is of a model of {' x '.join(map(str, gates.shape))} gates; use another checkpoint")
    return gates


def read_weights(checkpoint: Path, trust: bool = False) -> TensorFiles:
    """Return the model's full fp32 weights by name, read on access; see `tensor_files.from_checkpoint`."""
    return from_checkpoint(checkpoint, read_state(checkpoint)["zero_stage"], trust)


def write_manifest(checkpoint: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Write the manifest, the last file of a checkpoint.

    Args:
        checkpoint: its folder, complete but for the manifest.
        hashes: sha256 of each of the other files by name; None: compute them.
    """
    if hashes is None:
        hashes = {path.name: sha256(path) for path in checkpoint.iterdir() if path.name != MANIFEST_FILE}
    write_atomic(checkpoint / MANIFEST_FILE, json.dumps({"sha256": dict(sorted(hashes.items()))}, indent=1))


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
