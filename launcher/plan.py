"""The plan of a job: which ranks run what, with which environment and meeting where. Made before any process starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusiontree.config import RunConfig, dataset_manifest, deepspeed_json
from fusiontree.errors import UserError
from fusiontree.network import free_port


@dataclass(frozen=True)
class Plan:
    """A job that can start; each kind of launch renders it in its own way."""

    nodes: int
    ranks_per_node: int
    program: tuple[str, ...]  # Python module that every rank runs, then its arguments
    environment: Mapping[str, str]  # variables on top of the caller's own
    master_address: str  # rendezvous: where rank 0 listens
    master_port: int
    devices: tuple[int, ...] | None = None  # GPUs of a node by index, one a rank; None: the first ones, or CPUs

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def plan_local(config: RunConfig, source: str, overrides: Sequence[str], ranks: int) -> Plan:
    """Plan `ranks` ranks of training on this machine, after checking all that can be checked without starting them.

    Args:
        config: what `source` and `overrides` say; the ranks read them again.

    Raises:
        UserError: the batch does not divide, the dataset or the DeepSpeed settings are missing or wrong, or there are
            fewer GPUs than ranks.
    """
    if ranks < 1:
        raise UserError(f"--local {ranks}: give the number of ranks, at least 1")
    config.accumulation_steps(ranks)
    deepspeed_json(config)
    dataset_manifest(config)
    gpus = visible_gpus()
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if gpus else "cpu")
    return Plan(
        nodes=1,
        ranks_per_node=ranks,
        program=("fusiontree", "train", source, *overrides),
        environment={"DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": _threads(ranks)},
        master_address="127.0.0.1",
        master_port=free_port(),
        devices=_devices(gpus, ranks) if accelerator == "cuda" else None,
    )


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES would list them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)
    if not present or chosen is None:
        return present
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _devices(gpus: list[str], ranks: int) -> tuple[int, ...] | None:
    """The GPUs that `ranks` ranks take; None leaves the choice to DeepSpeed, which takes the first ones."""
    if not gpus:  # asked for by DS_ACCELERATOR on a machine that shows its GPUs in another way
        return None
    if ranks > len(gpus):
        raise UserError(
            f"--local {ranks} needs {ranks} GPUs, here are {len(gpus)} ({','.join(gpus)}); start fewer ranks"
        )
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return None
    if not all(name.isdecimal() for name in gpus):
        raise UserError(f"CUDA_VISIBLE_DEVICES={','.join(gpus)}: DeepSpeed's launcher takes indices only, e.g. 0,1")
    return tuple(map(int, gpus[:ranks]))


def _threads(ranks: int) -> str:
    """Threads per rank: the caller's OMP_NUM_THREADS, else the cores shared out."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
