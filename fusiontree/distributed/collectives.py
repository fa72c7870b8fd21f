"""Setup of the ranks of a job, and their collectives."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.device import accelerator
from fusiontree.distributed.environment import number
from fusiontree.distributed.ports import free_port
from fusiontree.errors import RunError, UserError
from fusiontree.zero.setup import init_distributed


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that writes shared output: metrics, manifests, the console."""
        return self.rank == 0


def start() -> World:
    """Initialize the process group from RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; without them, with a single rank.

    CUDA devices use NCCL, CPUs use gloo.

    Raises:
        UserError: a variable is not a number, or RANK is not below WORLD_SIZE.
    """
    size = number("WORLD_SIZE", 1)
    values = {"RANK": number("RANK", 0, size), "WORLD_SIZE": size, "LOCAL_RANK": number("LOCAL_RANK", 0)}
    port = number("MASTER_PORT", 0, 2**16) or free_port()
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_PORT=str(port))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    cuda, local_rank = accelerator() == "cuda", values["LOCAL_RANK"]
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    init_distributed("nccl" if cuda else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum `value` over all ranks, in place, and return it."""
    dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Reduce `value` to its maximum over all ranks, in place, and return it."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


class HostSum:
    """An asynchronous sum of a few figures over all ranks, copied to the host while the device continues."""

    def __init__(self, figures: Tensor):
        """Start the reduction of `figures`, in place; a collective call."""
        dist.all_reduce(figures)
        self._figures, self._arrived = figures, None
        if figures.is_cuda:
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Return the sums; work that was queued on the device after the reduction is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._figures.tolist()


def barrier() -> None:
    """Wait until all ranks call this."""
    dist.barrier()


def background_group(seconds: float) -> Any:
    """Return a gloo group of all ranks for a background thread, with a timeout in seconds; a collective call."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def set_timeout(seconds: float) -> None:
    """Set the timeout of all existing process groups; `init_process_group` would set that of the default group only."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def on_main(function: Callable[[], Any]) -> Any:
    """Call `function` on the main rank and return its result on every rank.

    Raises:
        UserError, RunError, OSError: `function` raised it, on every rank.
    """
    found: Any = None
    if dist.get_rank() == 0:
        try:
            found = function()
        except (UserError, RunError, OSError) as error:
            found = error
    found = from_main(found)
    if isinstance(found, Exception):
        raise found
    return found


def from_main(value: Any, group: Any = None) -> Any:
    """Broadcast the main rank's `value` (any picklable object) and return it."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Return the `value` (any picklable object) of every rank, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank ended; the cause is on that rank."""
    gloo = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in gloo)


def is_timeout(error: RuntimeError) -> bool:
    """Return whether a collective failed because of the timeout that `set_timeout` sets."""
    return any(sign in str(error) for sign in ("Timed out waiting", "timed out waiting", "Application timeout"))


def leave() -> None:
    """Wait for all ranks, then destroy the process group."""
    dist.barrier()
    dist.destroy_process_group()
