"""Copies of a DeepSpeed engine's checkpoint files in host memory."""

from pathlib import Path
from typing import Any

import torch

from fusiontree.zero.engine import in_memory, keeps_states_on_nvme


class _Collector:
    """Stands in for DeepSpeed's writer of files and keeps a copy of each instead."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _host_copy(state_dict)

    def create(self, info: Any) -> None:
        """Nothing is to be prepared."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made when the files are written."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


def snapshot(engine: Any) -> dict[str, Any]:
    """This rank's files of a checkpoint by name, in host memory; no later update changes them."""
    writer, engine.checkpoint_engine = engine.checkpoint_engine, _Collector()
    try:
        engine.save_checkpoint("in-memory", tag="snapshot", save_latest=False)
        files = engine.checkpoint_engine.files
    finally:
        engine.checkpoint_engine = writer
    if keeps_states_on_nvme(engine):
        _fetch_from_nvme(engine, next(file for name, file in files.items() if name.endswith("optim_states.pt")))
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return files


def _fetch_from_nvme(engine: Any, file: dict[str, Any]) -> None:
    """Put into a file of the optimizer's states what DeepSpeed leaves out: its parts of them that are not in memory."""
    states, zero = file["optimizer_state_dict"], engine.optimizer
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        with in_memory(engine, number):
            states["fp32_flat_groups"][number] = _host_copy(flat)
            states["optimizer_state_dict"]["state"][number] = _host_copy(zero.optimizer.state[flat])


def _host_copy(value: Any) -> Any:
    """`value` with copies of its tensors, which on a GPU arrive with the next synchronisation."""
    if torch.is_tensor(value):
        value = value.detach()
        if value.is_cuda:  # pinned memory is many times as fast, and torch keeps it for the next copy
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _host_copy(part)) for key, part in value.items())
    return type(value)(map(_host_copy, value)) if type(value) in (list, tuple) else value
