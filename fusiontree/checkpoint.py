"""Checkpoints: written beside, hashed, renamed when whole; read only when every hash agrees.

``checkpoints/step-N/`` holds DeepSpeed's files, ``state.json`` (what a resume needs to know), ``config.yaml``,
``gates.safetensors`` and ``manifest.json`` (sha256 of all others, written last).
``checkpoints/latest`` names the newest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusiontree import distributed, lease
from fusiontree.distributed import World
from fusiontree.errors import RunError, UserError
from fusiontree.files import fsync_folder, write_atomic

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
GATES = "gates.safetensors"


def save(
    engine: Any,
    world: World,
    folder: Path,
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    gates: Tensor,
    keep_last: int,
) -> Path:
    """Write a checkpoint of `engine` at ``state["step"]`` under `folder`; all ranks call it together.

    `texts` are further files by name. Older checkpoints beyond `keep_last` go once this one is whole.

    Raises:
        RunError: a file could not be written; nothing is left under the checkpoint's name.
    """
    final = folder / f"step-{state['step']}"
    partial = folder / f".{final.name}.partial"
    if world.is_main:
        partial.mkdir(parents=True)
    distributed.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in RuntimeError
        # this rank's end is what tells the others, who wait inside DeepSpeed
        raise _failure(folder, error) from None
    failure = None
    if world.is_main:
        try:
            _write_rest(partial, {STATE: json.dumps(state, indent=1), **texts}, gates)
            _put_in_place(partial, final)
        except (OSError, SafetensorError) as error:
            failure = error
    failed = distributed.sum_over_ranks(torch.tensor(int(failure is not None), device=world.device)).item()
    if failed:
        raise _failure(folder, failure or RuntimeError("the main rank could not write its part"))
    if world.is_main:
        _retain(folder, final, keep_last)
    return final


def clear_partials(folder: Path) -> None:
    """Remove what saves that never ended have left under `folder`."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def load(engine: Any, checkpoint: Path) -> None:
    """Give `engine` the weights and the optimizer state of `checkpoint`; all ranks call it together."""
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise RunError(f"checkpoint {checkpoint} could not be loaded by DeepSpeed; see the run's logs")


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under `folder`, oldest step first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `folder` that verifies, and a line for each newer one that does not.

    Raises:
        RunError: there are checkpoints and none verifies.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, damaged
        damaged.append(f"checkpoint {checkpoint} is damaged and passed over: {problems[0]}")
    if damaged:
        raise RunError(f"no checkpoint under {folder} verifies ({damaged[0]}); restore one or remove the folder")
    return None, damaged


def resolve(source: Path) -> Path:
    """The checkpoint that `source`, a run's folder or a checkpoint's, stands for; it is verified.

    Raises:
        UserError: there is none. RunError: it does not verify.
    """
    source = source.resolve()
    if (source / MANIFEST).exists() and (source / STATE).exists():
        if problems := verify(source):
            raise RunError(f"checkpoint {source} does not verify: {problems[0]}; use another one")
        return source
    if not source.is_dir():
        raise UserError(f"no run or checkpoint at {source}; give a folder such as runs/NAME")
    found, _ = newest(source / "checkpoints")
    if found is None:
        raise UserError(f"{source} holds no checkpoint; train first, or give another folder")
    return found


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with the files of `checkpoint`, a line each; nothing if it is whole."""
    try:
        files: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} is missing or unreadable ({error})"]
    problems = []
    for name, expected in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            problems.append(f"{name} leaves the checkpoint's folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif _sha256(path) != expected:
            problems.append(f"{name} does not match its sha256")
    return problems


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as the state."""
    return json.loads((checkpoint / STATE).read_text())


def read_gates(checkpoint: Path) -> Tensor:
    """Running mean of the gates, fp32 [layers, H]."""
    return load_file(checkpoint / GATES)["mean"]


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights by name, fp32, whole, whatever the ZeRO stage and the number of ranks."""
    if read_state(checkpoint)["zero_stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    # below stage 3 every rank holds whole fp32 weights, which are the master weights themselves
    states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return states["module"]


def _write_rest(partial: Path, texts: Mapping[str, str], gates: Tensor) -> None:
    """Write what is not DeepSpeed's, sync every file and seal the folder with the manifest."""
    save_file({"mean": gates.cpu()}, partial / GATES)
    for name, text in texts.items():
        write_atomic(partial / name, text)
    hashes = {}
    for path in sorted(partial.iterdir()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        hashes[path.name] = _sha256(path)
    write_atomic(partial / MANIFEST, json.dumps({"sha256": hashes}, indent=1))


def _put_in_place(partial: Path, final: Path) -> None:
    lease.check(final.parent.parent)  # cut off while another start goes on, this one must not put its own in the way
    shutil.rmtree(final, ignore_errors=True)  # one that did not verify: training has come to its step again
    os.replace(partial, final)
    fsync_folder(final.parent)
    write_atomic(final.parent / "latest", final.name + "\n")


def _retain(folder: Path, newest: Path, keep_last: int) -> None:
    """Remove the checkpoints that are too old, and those of later steps: damaged ones that training fell back from."""
    found = list_checkpoints(folder)
    place = found.index(newest)
    for path in [*found[: max(0, place + 1 - keep_last)], *found[place + 1 :]]:
        shutil.rmtree(path)


def _failure(folder: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0]
    return RunError(f"checkpoint in {folder} could not be written: {reason}; free disk space and start again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
