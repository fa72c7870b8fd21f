"""Ranks and what they do together: start, sum, wait, leave."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.device import accelerator
from fusiontree.distributed.ports import free_port
from fusiontree.errors import RunError, UserError
from fusiontree.zero.setup import disable_shared_memory_comm


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once: metrics, manifests, the console."""
        return self.rank == 0


def start() -> World:
    """Join the ranks that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*); alone without them.

    NCCL joins CUDA devices, gloo joins CPUs.
    """
    cuda = accelerator() == "cuda"
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())

    import deepspeed

    disable_shared_memory_comm()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), device)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place, on the device."""
    dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """The greatest `value` of all ranks, in place, on the device."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


class HostSum:
    """The sum of a few figures over all ranks, on its way to the host while the device goes on."""

    def __init__(self, figures: Tensor):
        """Start it; all ranks do so together. `figures` is used up."""
        dist.all_reduce(figures)
        self._figures, self._arrived = figures, None
        if figures.is_cuda:
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The sums; waits for no work that was given to the device after this one."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._figures.tolist()


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def side_group(seconds: float) -> Any:
    """A group of all ranks for a thread beside training, over the hosts' network; it waits so long for any of them."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def set_timeout(seconds: float) -> None:
    """Let the collectives of all groups that exist give up after so long; a time-out at the start reaches one only."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def on_main(make: Callable[[], Any]) -> Any:
    """What `make` returns on the main rank, on every rank; or raises there.

    Raises:
        UserError, RunError, OSError: `make` did.
    """
    found: Any = None
    if dist.get_rank() == 0:
        try:
            found = make()
        except (UserError, RunError, OSError) as error:
            found = error
    found = from_main(found)
    if isinstance(found, Exception):
        raise found
    return found


def from_main(value: Any, group: Any = None) -> Any:
    """The main rank's `value` (anything that pickles), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """The `value` of every rank (anything that pickles), in their order, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone: a consequence, not the cause."""
    gloo = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in gloo)


def is_time_out(error: RuntimeError) -> bool:
    """Whether a collective gave up waiting, as `set_timeout` lets it."""
    return any(sign in str(error) for sign in ("Timed out waiting", "timed out waiting", "Application timeout"))


def leave() -> None:
    """Part in good order: wait for the others, then take the process group down."""
    dist.barrier()
    dist.destroy_process_group()
