"""The checkpoints of a run: placement, verification, contents.

``checkpoints/step-N/`` contains DeepSpeed's files, ``state.json`` (counters and fingerprints for a resume),
``config.yaml``, ``gates.safetensors`` and ``manifest.json`` (sha256 of all others, written last). A checkpoint is read
only if every hash matches. ``checkpoints/latest`` names the newest. `fusiontree.checkpoint.saver` writes them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fusiontree.checkpoint.tensor_files import TensorFiles, from_checkpoint
from fusiontree.console import console
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.files import fsync_folder, parse_json, write_atomic
from fusiontree.run import lease
from fusiontree.run.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    GATES_FILE,
    LATEST,
    MANIFEST_FILE,
    STATE_FILE,
    list_checkpoints,
    run_of,
)
from fusiontree.zero import layout, reshard
from fusiontree.zero.engine import keeps_states_on_nvme

_STATE_KEYS = (  # all that training saves; each is required
    *("step", "tokens", "rows_consumed", "world_size", "zero_stage", "data_fingerprint", "tokenizer_fingerprint"),
    *("eos_id", "pad_id", "wandb_id", "left_out", "bad_rows", "health"),
)


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


def tidy(folder: Path) -> None:
    """Remove the leftovers of interrupted saves in `folder`; restore a replaced checkpoint if its successor is bad."""
    for old in folder.glob(".step-*.old"):
        final = folder / old.name[1:].removesuffix(".old")
        if final.exists() and not verify(final):
            shutil.rmtree(old)
        else:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(old, final)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)
    for partial in folder.glob(".latest.partial-*"):
        partial.unlink()


def load(engine: Any, world: World, checkpoint: Path, fresh: bool, trust: bool) -> None:
    """Load weights and optimizer states of `checkpoint` into `engine`; a collective call.

    DeepSpeed's own loader serves a new engine with the checkpoint's number of ranks and ZeRO stage. In all other cases,
    and with states on NVMe, `reshard.load` copies the parts. DeepSpeed unpickles any object: call `refuse_code` first
    for a checkpoint that this process has not written.

    Args:
        engine: DeepSpeed's.
        world: the ranks.
        checkpoint: its folder.
        fresh: whether the engine has made no update yet.
        trust: unpickle arbitrary objects in the files, which can run any code.
    """
    state = read_state(checkpoint)
    same = (state["zero_stage"], state["world_size"]) == (engine.zero_optimization_stage(), world.size)
    if not (same and fresh) or keeps_states_on_nvme(engine):
        reshard.load(engine, checkpoint, state["zero_stage"], trust)
        return
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise RunError(f"checkpoint {checkpoint} could not be loaded by DeepSpeed; see the run's logs")


def refuse_code(checkpoint: Path) -> None:
    """Raise UserError if a file of `checkpoint` contains more than tensors and DeepSpeed's own plain objects.

    The values of tensors are not read.
    """
    read = layout.reader(values=False)
    for path in sorted(checkpoint.glob("*.pt")):
        read(path)


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint in `folder` that verifies, and a line on each newer one, which is damaged.

    Raises:
        RunError: there are checkpoints, but none verifies.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, damaged
        damaged[checkpoint] = f"checkpoint {checkpoint} is damaged and skipped: {problems[0]}"
    if damaged:
        line, *_ = damaged.values()
        raise RunError(f"no valid checkpoint under {folder} ({line}); restore one or remove the folder")
    return None, damaged


def resolve(source: Path) -> Path:
    """Return the checkpoint at `source`, or the newest one if it is a run's folder; it is verified.

    Raises:
        UserError: there is none.
        RunError: it does not verify.
    """
    source = source.resolve()
    if (source / STATE_FILE).exists() or source in list_checkpoints(source.parent):
        if problems := verify(source):
            raise RunError(f"checkpoint {source} is damaged: {problems[0]}; restore it or use another one")
        return source
    if not source.is_dir():
        raise UserError(
            f"no run or checkpoint at {source}; give the folder of a run or of a checkpoint, e.g. runs/NAME"
        )
    found, damaged = newest(source / CHECKPOINTS)
    for line in damaged.values():
        console.print(line, markup=False)
    if found is None:
        raise UserError(f"{source} has no checkpoint; train first, or give another folder")
    return found


def verify(checkpoint: Path) -> list[str]:
    """Return a line on each file of `checkpoint` that is missing or damaged; none if it is complete."""
    try:
        files: dict[str, str] = dict(parse_json((checkpoint / MANIFEST_FILE).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST_FILE} is missing or unreadable ({short_cause(error)})"]
    problems = []
    for name, expected in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            problems.append(f"{name} is outside the checkpoint's folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != expected:
            problems.append(f"{name} does not match its sha256")
    return problems + [
        f"{name} is not in {MANIFEST_FILE}" for name in (CONFIG_FILE, STATE_FILE, GATES_FILE) if name not in files
    ]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that `Saver.save` wrote.

    Raises:
        RunError: the file is damaged or lacks keys.
    """
    path = checkpoint / STATE_FILE
    try:
        state: dict[str, Any] = parse_json(path.read_text())
        missing = [key for key in _STATE_KEYS if key not in state]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({short_cause(error)}); restore the checkpoint or use another one") from None
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}; restore the checkpoint or use another one")
    return state


def read_gates(checkpoint: Path) -> Tensor:
    """Return the running mean of the gates, fp32 [layers, H]."""
    return load_file(checkpoint / GATES_FILE)["mean"]


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
