"""Checkpoints: where they lie, whether they are whole, what is in them.

``checkpoints/step-N/`` holds DeepSpeed's files, ``state.json`` (what a resume needs to know), ``config.yaml``,
``gates.safetensors`` and ``manifest.json`` (sha256 of all others, written last); it is read only when every hash
agrees. ``checkpoints/latest`` names the newest. `fusiontree.checkpoint.saver` writes them.
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
from fusiontree.errors import RunError, UserError
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

_STATE_KEYS = (  # without which no checkpoint is read; later versions have added others
    *("step", "tokens", "rows_consumed", "world_size", "zero_stage", "data_fingerprint", "tokenizer_fingerprint"),
    *("eos_id", "pad_id", "wandb_id"),
)


def partial_of(final: Path, start: str) -> Path:
    """Where a checkpoint of the start of the run marked `start` grows until it is whole."""
    return final.with_name(f".{final.name}.{start}.partial")


def put_in_place(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of one that is there, and make `latest` name it.

    Raises:
        RunError: another start of the run holds it now; cut off from it, this one must not put its own in the way.
    """
    lease.check(run_of(final))
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # training has come to its step again
        os.replace(final, old)
    os.replace(partial, final)
    fsync_folder(final.parent)
    write_atomic(final.parent / LATEST, final.name + "\n")
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what saves that never ended have left under `folder`; put back what no whole checkpoint replaced."""
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
    """Give `engine` the weights and the optimizer state of `checkpoint`; all ranks call it together.

    DeepSpeed itself loads what was saved on as many ranks at the same ZeRO stage, into a `fresh` engine, one that has
    not trained; otherwise, and to NVMe, the pieces are copied one by one. DeepSpeed unpickles whatever it finds: a
    checkpoint that was there before the run is for `refuse_code` first.
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
    """Raise UserError if a file of `checkpoint` holds more than tensors and DeepSpeed's own few objects.

    What tensors hold is not read, only where it lies.
    """
    read = layout.opener(values=False)
    for path in sorted(checkpoint.glob("*.pt")):
        read(path)


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint under `folder` that verifies, and for each newer one, which does not, a line.

    Raises:
        RunError: there are checkpoints and none verifies.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, damaged
        damaged[checkpoint] = f"checkpoint {checkpoint} is damaged and passed over: {problems[0]}"
    if damaged:
        line, *_ = damaged.values()
        raise RunError(f"no checkpoint under {folder} verifies ({line}); restore one or remove the folder")
    return None, damaged


def resolve(source: Path) -> Path:
    """The checkpoint that `source`, a run's folder or a checkpoint's, stands for; it is verified.

    Raises:
        UserError: there is none. RunError: it does not verify.
    """
    source = source.resolve()
    if (source / STATE_FILE).exists() or source in list_checkpoints(source.parent):
        if problems := verify(source):
            raise RunError(f"checkpoint {source} does not verify: {problems[0]}; use another one")
        return source
    if not source.is_dir():
        raise UserError(f"no run or checkpoint at {source}; give a folder such as runs/NAME")
    found, damaged = newest(source / CHECKPOINTS)
    for line in damaged.values():
        console.print(line, markup=False)
    if found is None:
        raise UserError(f"{source} holds no checkpoint; train first, or give another folder")
    return found


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with the files of `checkpoint`, a line each; nothing if it is whole."""
    try:
        files: dict[str, str] = dict(parse_json((checkpoint / MANIFEST_FILE).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST_FILE} is missing or unreadable ({error})"]
    problems = []
    for name, expected in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            problems.append(f"{name} leaves the checkpoint's folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != expected:
            problems.append(f"{name} does not match its sha256")
    return problems + [
        f"{name} is not in {MANIFEST_FILE}" for name in (CONFIG_FILE, STATE_FILE, GATES_FILE) if name not in files
    ]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as the state.

    Raises:
        RunError: it is none.
    """
    path = checkpoint / STATE_FILE
    try:
        state: dict[str, Any] = parse_json(path.read_text())
        missing = [key for key in _STATE_KEYS if key not in state]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); restore the checkpoint or use another one") from None
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}; restore the checkpoint or use another one")
    return state


def read_gates(checkpoint: Path) -> Tensor:
    """Running mean of the gates, fp32 [layers, H]."""
    return load_file(checkpoint / GATES_FILE)["mean"]


def read_weights(checkpoint: Path, trust: bool = False) -> TensorFiles:
    """The model's weights by name, fp32, each whole and read when asked for, whatever the ZeRO stage and the ranks.

    Args and errors: as of `tensor_files.from_checkpoint`.
    """
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
