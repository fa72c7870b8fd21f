"""Setup of DeepSpeed: the process group, the engine, parameters partitioned at creation, compiled operations."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fusiontree.errors import UserError
from fusiontree.zero import internals
from fusiontree.zero.settings import OFFLOADED


def init_distributed(backend: str) -> None:
    """Initialize the process group through DeepSpeed, without its shared-memory all-reduce for CPUs.

    That all-reduce needs a compiler and leaks files in /dev/shm, and training never calls it.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    import deepspeed
    from deepspeed import ops

    internals.require(ops, internals.OPS)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def initialize(model: nn.Module, optimizer: Any, settings: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine for `model`, checked for the attributes that `fusiontree.zero` uses.

    Raises:
        UserError: this version of DeepSpeed lacks one of them.
    """
    import deepspeed  # not before `collectives.start`, which selects DeepSpeed's accelerator

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    internals.check_engine(engine)
    return engine


def partition_parameters(modules: Iterable[nn.Module], settings: dict[str, Any]) -> None:
    """Partition the parameters of each of `modules` as soon as it is materialized, for ZeRO stage 3.

    A rank never has more than one unpartitioned module in memory. `zero.Init` sets up partitioning on its first module;
    the method that it adds to parameters partitions the others.
    """
    import deepspeed

    first: Any = None
    for module in modules:
        own = list(module.parameters(recurse=False))
        if first is None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            first = own[0]
            internals.require(first, internals.PARAMETER_STAGE_3)
        else:
            first.convert_to_zero_parameters(param_list=own)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the unpartitioned parameter; at ZeRO stage 3 `parameter.shape` itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def muon_class() -> Any:
    """Return DeepSpeed's Muon. Torch's own cannot be used: ZeRO would pass it flat partitions, not matrices."""
    return internals.require_class(internals.MUON)


def require_async_io(zero: dict[str, Any]) -> None:
    """Check that DeepSpeed can build its asynchronous I/O if `zero` (``zero_optimization``) offloads to NVMe.

    Raises:
        UserError: it cannot.
    """
    offloads = (zero.get(key) or {} for key in OFFLOADED)
    on_nvme = any(offload.get("device") == "nvme" for offload in offloads)
    if on_nvme and not internals.require_class(internals.ASYNC_IO)().is_compatible(verbose=False):
        raise UserError(
            "states on NVMe need DeepSpeed's asynchronous I/O, which it builds at first use; install libaio-dev, g++ "
            "and ninja, or set deepspeed=zero3_offload"
        )
