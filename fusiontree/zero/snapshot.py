"""Copies of a DeepSpeed engine's checkpoint files in host memory."""

from pathlib import Path
from typing import Any

import torch

from fusiontree.zero.engine import flat_states, keeps_states_on_nvme


class _Collector:
    """A checkpoint engine for DeepSpeed that copies each file's content to host memory and writes nothing."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _host_copy(state_dict)

    def create(self, info: Any) -> None:
        """Do nothing: there is nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: folders are created when the files are written."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


def snapshot(engine: Any) -> dict[str, Any]:
    """Return this rank's checkpoint files by name, copied to host memory; later updates do not change them."""
    writer, engine.checkpoint_engine = engine.checkpoint_engine, _Collector()
    # `save_checkpoint` would also write scripts and copy the files on NVMe, in the checkpoint's folder, during the step
    engine._copy_recovery_script = lambda folder: None
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        engine.save_checkpoint("in-memory", tag="snapshot", save_latest=False)
        files = engine.checkpoint_engine.files
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
    if keeps_states_on_nvme(engine):
        _add_states_on_nvme(engine, next(file for name, file in files.items() if name.endswith("optim_states.pt")))
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return files


def _add_states_on_nvme(engine: Any, file: dict[str, Any]) -> None:
    """Add the weights and states that DeepSpeed leaves out of an optimizer file because they are on NVMe."""
    contents = file["optimizer_state_dict"]
    for number, flat, states in flat_states(engine):
        contents["fp32_flat_groups"][number] = _host_copy(flat)
        contents["optimizer_state_dict"]["state"][number] = _host_copy(states)


def _host_copy(value: Any) -> Any:
    """Return `value` with its tensors copied to host memory; copies from a GPU need a synchronization to complete."""
    if torch.is_tensor(value):
        value = value.detach()
        if value.is_cuda:  # copies to pinned memory are many times faster, and torch reuses it for the next snapshot
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _host_copy(part)) for key, part in value.items())
    return type(value)(map(_host_copy, value)) if type(value) in (list, tuple) else value
