"""What all measurements share: the clock, the memory, the device and what it could do at most."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fusiontree import distributed, flops
from fusiontree.errors import RunError


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the device's maker states; None on a CPU and for an unknown one."""
    return flops.peak_flops(distributed.device_name(device))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device and the torch that a figure was measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def elapsed(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes, until the device has done all it was given."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, the 95th of a hundred (the nearest one measured), and both ends."""
    return {
        "median_seconds": statistics.median(seconds),
        "p95_seconds": sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1],
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
    }


def reset_memory(device: torch.device) -> None:
    """Give back what is free and begin a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Bytes since `reset_memory` at the peak: of tensors, and reserved for them; None on a CPU."""
    if device.type != "cuda":
        return {"peak_memory_bytes": None, "reserved_memory_bytes": None}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextlib.contextmanager
def naming_lack_of_memory(what: str) -> Iterator[None]:
    """Turn a device's lack of memory into one line that says what was tried.

    Raises:
        RunError: there was not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of GPU memory with {what}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make the parameters of a module on `device`, in `dtype` but for those that name another themselves."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)
