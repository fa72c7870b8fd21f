"""Profile of one training step: GPU time by kind of work and by kernel, and idle time."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fusiontree.device import elapsed
from fusiontree.files import write_atomic

TOP = 40  # kernels listed in the report

# kind of work by the name of a kernel (on a CPU: of an operator); the first match counts
_KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d|gloo"),
    # kernels of torch.compile contain the names of the operators they fuse, so they must match first; then ours
    ("fused pointwise", r"^triton_(poi|red|per|for)_|^_(swiglu|gated_norm|joined_norm|heads)_"),
    ("scan, backward", r"_chunk_\w*bwd|_state_passing_bwd|_scan_\w*backward"),
    ("scan, forward", r"_chunk_(cumsum|state|scan)_fwd|_bmm_chunk_fwd|_state_passing_fwd|_scan_(decay|outputs)_kernel"),
    ("attention, backward", r"(flash|fmha|flex|attention|sdpa).*(bwd|backward|bprop)|(bwd|backward).*(flash|fmha)"),
    ("attention, forward", r"flash|fmha|flex_attention|attention|sdpa|_decode_(join_)?kernel"),
    ("convolution", r"conv1d|convolution|_conv_"),
    ("loss head", r"cross_entropy|softmax|logsumexp|nll_|liger|element_mul"),
    ("optimizer and clipping", r"multi_tensor|adam|lpnorm|foreach"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|wgmma|splitk|aten::(b?mm|addmm|baddbmm)$"),
    ("copies and casts", r"memcpy|copy|cast|catarray|aten::cat$"),
    ("memory set", r"memset|fill"),
    ("embedding", r"embedding|index"),
    ("norms and reductions", r"norm|reduce|aten::(sum|mean)"),
    ("unfused pointwise", r"elementwise|aten::"),
)


class Kernel(NamedTuple):
    """One execution of a kernel; on a CPU, all executions of an operator together."""

    name: str
    start: float  # µs
    duration: float  # µs
    calls: int = 1


def profile_step(device: torch.device, run: Callable[[], Any], path: Path, usual_seconds: float) -> dict[str, Any]:
    """Profile the second of two calls of `run`, after all initialization, and write a ranked report to `path`.

    Args:
        device: of the model.
        run: executes one step.
        path: Markdown file of the report.
        usual_seconds: time of `run` without the profiler, for the report.

    Returns:
        Seconds of the step, busy and idle seconds of the device, and the share of each kind of work.
    """
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    for _ in range(2):
        with profile(activities=[activity]) as profiler:
            wall = elapsed(device, run)
    kernels = _device_kernels(profiler) if device.type == "cuda" else _operators(profiler)
    busy = _busy_seconds(kernels) if device.type == "cuda" else sum(kernel.duration for kernel in kernels) / 1e6
    kinds = _summed(kernels, lambda kernel: kind_of(kernel.name))
    total = sum(duration for duration, _ in kinds.values())
    summary = {
        "step_seconds": wall,
        "unwatched_step_seconds": usual_seconds,
        "busy_seconds": busy,
        "gap_seconds": max(0.0, wall - busy),
        "shares": {kind: duration / total for kind, (duration, _) in kinds.items()},
    }
    write_atomic(path, _report(summary, kinds, _summed(kernels, lambda kernel: kernel.name)))
    return {"file": str(path), **summary}


def exposed_communication(device: torch.device, run: Callable[[], Any]) -> float | None:
    """Profile one call of `run`; return the seconds of communication that no other kernel overlaps, None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        elapsed(device, run)
    kernels = _device_kernels(profiler)
    return _busy_seconds(kernels) - _busy_seconds(k for k in kernels if kind_of(k.name) != "communication")


def kind_of(name: str) -> str:
    """Return the kind of work of a kernel by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def _device_kernels(profiler: Any) -> list[Kernel]:
    """Return all kernels, copies and memory sets on the device from the profiler's trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    return [Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in wanted]


def _operators(profiler: Any) -> list[Kernel]:
    """Return the self time of each operator on a CPU."""
    return [Kernel(e.key, 0.0, e.self_cpu_time_total, e.count) for e in profiler.key_averages()]


def _busy_seconds(kernels: Iterable[Kernel]) -> float:
    """Return the seconds in which at least one kernel ran: the length of the union of their intervals."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        finish = kernel.start + kernel.duration
        busy += max(0.0, finish - max(kernel.start, end))
        end = max(end, finish)
    return busy / 1e6


def _summed(kernels: Sequence[Kernel], key: Callable[[Kernel], str]) -> dict[str, tuple[float, int]]:
    """Return duration in µs and number of calls by `key`, longest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        sums[key(kernel)][0] += kernel.duration
        sums[key(kernel)][1] += kernel.calls
    ranked = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: (duration, int(calls)) for name, (duration, calls) in ranked}


def _report(summary: dict[str, Any], kinds: dict[str, tuple[float, int]], names: dict[str, tuple[float, int]]) -> str:
    total = sum(duration for duration, _ in kinds.values())
    shown = dict(list(names.items())[:TOP])
    step, usual, busy, gap = (
        f"{summary[f'{name}_seconds'] * 1e3:,.1f} ms" for name in ("step", "unwatched_step", "busy", "gap")
    )
    lines = [
        "# One training step",
        f"{step} under the profiler, {usual} without it; the device was busy for {busy} and idle for {gap}.",
        "\n".join(_table("kind", kinds, total)),
        f"The {len(shown)} longest of {len(names)} kernels:",
        "\n".join(_table("kernel", shown, total)),
    ]
    return "\n\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, tuple[float, int]], total: float) -> list[str]:
    lines = [f"| {title} | calls | ms | share |", "|---|--:|--:|--:|"]
    for name, (duration, calls) in rows.items():
        text = name.replace("|", "\\|") if len(name) <= 120 else name[:117].replace("|", "\\|") + "..."
        lines.append(f"| {text} | {calls:,} | {duration / 1e3:,.2f} | {duration / total:.1%} |")
    return lines
