"""What all measurements share: the clock, the memory, the device and what it could do at most."""

import contextlib
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fusiontree.errors import RunError

# dense bf16 peaks in FLOP/s, from the makers' data sheets (where those state a figure "with sparsity", half of it); the
# first name found in the device's own counts
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "MI300X": 1307.4e12,
}


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


def timing_summary(seconds: Sequence[float]) -> dict[str, float]:
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


def memory_figures(device: torch.device) -> dict[str, int | None]:
    """Bytes since `reset_memory` at the peak: of tensors, and reserved for them; None on a CPU."""
    if device.type != "cuda":
        return {"peak_memory_bytes": None, "reserved_memory_bytes": None}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextlib.contextmanager
def oom_context(what: str) -> Iterator[None]:
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


def accelerator() -> str:
    """What computes here: ``cuda`` where there is a GPU, unless DS_ACCELERATOR says ``cpu``; else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def device_name(device: torch.device) -> str:
    """What the device's maker calls it; ``CPU`` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s that the device's maker states; None for an unknown device."""
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in device_name), None)


def utilisation(flops_per_s: float, device_name: str) -> dict[str, float]:
    """What a device does with its time, from the model's own FLOPs per second; MFU only where its peak is known."""
    peak = peak_flops(device_name)
    return {"tflop_per_s": flops_per_s / 1e12} | ({} if peak is None else {"mfu": flops_per_s / peak})
