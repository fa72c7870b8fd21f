"""The compute device: its name and peak, timing, memory."""

import contextlib
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fusiontree.errors import RunError, short_cause

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; where a sheet states a figure "with sparsity", half of it.
# The first key that is part of the device's name applies.
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
    """Return the device and the version of torch, to be stated with measured figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def elapsed(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the seconds that `run` takes, until all work queued on the device is done."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timing_summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile (the nearest measured value), minimum and maximum."""
    return {
        "median_seconds": statistics.median(seconds),
        "p95_seconds": sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1],
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
    }


def reset_memory(device: torch.device) -> None:
    """Release cached memory and reset the peak statistics."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_figures(device: torch.device) -> dict[str, int | None]:
    """Return the peaks since `reset_memory` in bytes, of tensors and of memory reserved for them; None on a CPU."""
    if device.type != "cuda":
        return {"peak_memory_bytes": None, "reserved_memory_bytes": None}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextlib.contextmanager
def oom_context(work: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line that names the `work` that was tried.

    Raises:
        RunError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of GPU memory with {work}: {short_cause(error)}") from None


@contextlib.contextmanager
def default_dtype_and_device(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Create tensors on `device` and in `dtype`, unless they specify their own, while the block runs."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def accelerator() -> str:
    """Return ``cuda`` if there is a GPU and DS_ACCELERATOR is not ``cpu``, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def device_name(device: torch.device) -> str:
    """Return the maker's name of the device; ``CPU`` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of tensors on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s that the device's maker states; None for an unknown device."""
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in device_name), None)


def utilization(flops_per_s: float, device_name: str) -> dict[str, float]:
    """Return throughput in TFLOP/s of the model's own operations, and MFU where the device's peak is known."""
    peak = peak_flops(device_name)
    return {"tflop_per_s": flops_per_s / 1e12} | ({} if peak is None else {"mfu": flops_per_s / peak})
