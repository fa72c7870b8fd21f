"""Every back-end of every operation, at a model's own shapes: time, rate, and how far it is from the reference.

Axes: B rows (1), L tokens, N query heads, K key-value heads, D head size, H SSM heads, P SSM head size, G groups,
S state size.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree import flops
from fusiontree.bench import measure, rows
from fusiontree.bench.train import bench_config
from fusiontree.console import progress_bar
from fusiontree.distributed import accelerator
from fusiontree.errors import RunError, UserError
from fusiontree.kernels import choose_kernels
from fusiontree.model import ops
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents, to_device

_CHECKED_TOKENS = 4096  # at most, of the comparison with the reference, which may be slow


class Case(NamedTuple):
    """One operation on one input."""

    op: str
    title: str
    call: Callable[[Callable[..., Any], Sequence[Tensor]], Tensor]  # the back-end on the inputs, to one output
    inputs: Callable[[], list[Tensor]]  # those that have a gradient
    flops: int | None = None  # of a forward pass; where it is None, memory bounds the operation
    moved: int | None = None  # bytes that a forward pass must read and write once


def bench_kernels(preset: str, overrides: list[str], seq_len: int | None = None, repeats: int = 10) -> dict[str, Any]:
    """Measure all back-ends that can run here.

    Args:
        preset: its name or a YAML file: the shapes. overrides: ``key=value``, as for a run.
        seq_len: tokens in the one row; None for the preset's.
        repeats: timed calls, of which the median counts.

    Returns:
        The machine, and for each operation, input and back-end: milliseconds of a forward pass and of both passes, the
        rate (TFLOP/s or TB/s: a backward pass counts as two forward ones), and the greatest difference of output and
        gradients from the fp32 reference, relative to its greatest value, on up to 4,096 tokens. Where it cannot run,
        why (`problem`).

    Raises:
        UserError: the configuration is wrong, or the environment fixes a back-end.
    """
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device, seq_len)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    cases = _cases(config.model, config.data.seq_len, device, dtype)
    near = _cases(config.model, min(config.data.seq_len, _CHECKED_TOKENS), device, dtype)
    figures = []
    with progress_bar() as bar:
        task = bar.add_task("kernels", total=len(cases), note="")
        for case, small in zip(cases, near, strict=True):
            for name, reason in ops.available(case.op, device.type).items():
                bar.update(task, note=f"{case.title}: {name}")
                if reason is None:
                    figures.append(_measure(case, small, name, device, repeats))
            bar.update(task, advance=1)
    return {
        "preset": config.name,
        "seq_len": config.data.seq_len,
        "precision": config.precision,
        **measure.describe_machine(device),
        "kernels": figures,
    }


def _measure(case: Case, small: Case, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"op": case.op, "input": case.title, "backend": name}
    function, reference = _backend(case.op, name, device), _backend(case.op, "reference", device)
    try:
        with measure.naming_lack_of_memory(f"{case.title}, {name}"):
            difference = _difference(small, function, reference)
            forward, both = _times(case, function, device, repeats)
    except RunError as error:
        return {**figures, "problem": str(error)}
    measure.reset_memory(device)
    return {
        **figures,
        "forward_ms": forward * 1e3,
        "both_ms": both * 1e3,
        **_rates(case, forward, both),
        "difference": difference,
    }


def _backend(op: str, name: str, device: torch.device) -> Callable[..., Any]:
    kernels = choose_kernels(device.type, {op: name})
    if kernels.names[op] != name:
        raise UserError(f"the environment's FUSIONTREE_{op.upper()} fixes the back-end of {op}; unset it")
    function: Callable[..., Any] = getattr(kernels, op)
    return function


def _times(case: Case, function: Callable[..., Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of a forward pass, and of a forward and a backward pass."""
    inputs = case.inputs()
    gradient = torch.ones_like(case.call(function, inputs))

    def both() -> None:
        torch.autograd.grad(case.call(function, inputs), inputs, gradient)

    def forward() -> None:
        with torch.no_grad():
            case.call(function, inputs)

    medians = []
    for run in (forward, both):
        run()  # compiles and tunes
        medians.append(statistics.median(measure.elapsed(device, run) for _ in range(repeats)))
    return medians[0], medians[1]


def _rates(case: Case, forward: float, both: float) -> dict[str, float]:
    if case.flops is not None:
        return {"forward_tflop_per_s": case.flops / forward / 1e12, "both_tflop_per_s": 3 * case.flops / both / 1e12}
    assert case.moved is not None
    return {"forward_tb_per_s": case.moved / forward / 1e12, "both_tb_per_s": 3 * case.moved / both / 1e12}


def _difference(case: Case, function: Callable[..., Any], reference: Callable[..., Any]) -> float:
    """Greatest difference from the reference in fp32, of the output and of each gradient, relative to its greatest."""
    inputs = case.inputs()
    exact = [value.detach().float().requires_grad_() for value in inputs]
    torch.manual_seed(1)
    weights = torch.randn_like(case.call(reference, exact))
    worst = 0.0
    for found, true in zip(
        _output_and_gradients(case, function, inputs, weights),
        _output_and_gradients(case, reference, exact, weights),
        strict=True,
    ):
        worst = max(worst, ((found.float() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item())
    return worst


def _output_and_gradients(
    case: Case, function: Callable[..., Any], inputs: list[Tensor], weights: Tensor
) -> list[Tensor]:
    output = case.call(function, inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights.to(output.dtype))]


# --- the operations' inputs ------------------------------------------------------------------------------------------


def _cases(model: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    packed, single = (_documents(kind, seq_len, device) for kind in ("packed", "single"))
    cases = [_scan(model, packed, device, dtype), _convolution(model, packed, device, dtype)]
    for heads, kv_heads, window in (
        (model.global_heads, model.global_kv_heads, None),
        (model.num_heads - model.global_heads, model.num_kv_heads - model.global_kv_heads, model.window),
    ):
        if heads:
            for kind, documents in (("packed", packed), ("single", single)):
                title = f"attention, {heads} heads, {'global' if window is None else f'window {window}'}, {kind}"
                cases.append(_attention(title, model.head_dim, heads, kv_heads, window, documents, device, dtype))
    return [*cases, _loss(model, seq_len, device, dtype)]


def _documents(kind: Any, seq_len: int, device: torch.device) -> Documents:
    batch = rows.synthetic_batch(kind, 1, seq_len, 2, (0,))
    return to_device(batch, device)[2]


def _drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes normal values that have a gradient; the same ones in the same order from each drawer."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, in_dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(in_dtype).requires_grad_()

    return draw


def _scan(model: ModelConfig, documents: Documents, device: torch.device, dtype: torch.dtype) -> Case:
    L, H, P = documents.seq_idx.shape[1], model.ssm_heads, model.ssm_head_dim
    G, S = model.ssm_groups, model.ssm_state_size

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        dt = F.softplus(draw(1, L, H, in_dtype=torch.float32).detach() - 4).requires_grad_()
        A = (-torch.linspace(1, 16, H, device=device)).requires_grad_()
        D = torch.ones(H, device=device, requires_grad=True)
        return [draw(1, L, H, P), dt, A, draw(1, L, G, S), draw(1, L, G, S), D]

    def call(function: Callable[..., Any], values: Sequence[Tensor]) -> Tensor:
        y: Tensor = function(*values, documents.seq_idx, chunk_size=model.chunk_size)[0]
        return y

    moved = L * ((2 * H * P + 2 * G * S) * dtype.itemsize + 4 * H)
    return Case("scan", f"scan, {H} heads of {P}, state {S}, packed", call, inputs, moved=moved)


def _convolution(model: ModelConfig, documents: Documents, device: torch.device, dtype: torch.dtype) -> Case:
    L, channels, taps = documents.seq_idx.shape[1], model.conv_size, model.conv_kernel

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        fp32 = {"in_dtype": torch.float32}
        return [draw(1, L, channels), draw(channels, taps, scale=0.5, **fp32), draw(channels, scale=0.5, **fp32)]

    def call(function: Callable[..., Any], values: Sequence[Tensor]) -> Tensor:
        y: Tensor = function(*values, documents.seq_idx)
        return y

    title = f"convolution, {channels} channels, {taps} taps, packed"
    return Case("convolution", title, call, inputs, moved=2 * L * channels * dtype.itemsize)


def _attention(
    title: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    window: int | None,
    documents: Documents,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    L = documents.seq_idx.shape[1]

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        return [draw(1, L, count, head_dim) for count in (heads, kv_heads, kv_heads)]

    def call(function: Callable[..., Any], values: Sequence[Tensor]) -> Tensor:
        y: Tensor = function(*values, documents.seq_idx, documents.bounds, window)
        return y

    lengths = documents.cu_seqlens.diff().tolist()
    pairs = sum(flops.visible_pairs(length, window) for length in lengths)
    return Case("attention", title, call, inputs, flops=4 * head_dim * heads * pairs)


def _loss(model: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> Case:
    H, V = model.hidden_size, model.vocab_size
    generator = torch.Generator(device).manual_seed(1)
    labels = torch.randint(V, (seq_len,), generator=generator, device=device)

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        return [draw(seq_len, H), draw(V, H, scale=H**-0.5, in_dtype=torch.float32)]

    def call(function: Callable[..., Any], values: Sequence[Tensor]) -> Tensor:
        loss: Tensor = function(*values, labels)
        return loss

    return Case("loss", f"loss head, {H} to {V}", call, inputs, flops=2 * V * H * seq_len)
