"""Benchmark of every back-end of every operation at a model's shapes: time, rate, and error against the reference.

Axes: B rows (1), L tokens, N query heads, K key-value heads, D head size, H SSM heads, P SSM head size, G groups,
S state size.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.bench import rows
from fusiontree.bench.train import Workload, bench_config
from fusiontree.console import progress_bar
from fusiontree.device import accelerator, describe_machine, elapsed, oom_context, reset_memory
from fusiontree.errors import RunError, UserError
from fusiontree.kernels import DTYPES, choose_kernels
from fusiontree.model import flops, kernel_registry
from fusiontree.model.attention import rotary_embedding
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents, to_device

_CHECKED_TOKENS = 4096  # limit for the comparison with the reference, which may be slow


class Case(NamedTuple):
    """One operation on one input."""

    op: str
    title: str
    call: Callable[[Any, Sequence[Tensor]], list[Tensor]]  # (back-end, inputs) → outputs
    inputs: Callable[[], list[Tensor]]
    flops: int | None = None  # operations of a forward pass; None: the operation is memory-bound


def bench_kernels(preset: str, overrides: list[str], seq_len: int | None = None, repeats: int = 10) -> dict[str, Any]:
    """Measure all back-ends that can run here.

    Args:
        preset: name or YAML file of the configuration with the model's shapes.
        overrides: ``key=value``, as for a run.
        seq_len: tokens in the single row; None for the preset's.
        repeats: number of timed calls; the median is reported.

    Returns:
        The machine, and for each operation, input and back-end: milliseconds of a forward pass and of forward plus
        backward, the rate (TFLOP/s or TB/s; a backward pass counts as two forward passes), and the largest difference
        of outputs and gradients from the fp32 reference, relative to its largest value, on up to 4,096 tokens. If the
        back-end runs out of memory, `problem` is the reason.

    Raises:
        UserError: the configuration is invalid, or an environment variable sets a back-end.
    """
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; it must be at least 1")
    device = torch.device(accelerator())
    config = bench_config(preset, overrides, device, Workload(seq_len=seq_len))
    dtype = DTYPES[config.precision]
    cases = _cases(config.model, config.data.seq_len, device, dtype)
    near = _cases(config.model, min(config.data.seq_len, _CHECKED_TOKENS), device, dtype)
    figures = []
    with progress_bar() as bar:
        task = bar.add_task("kernels", total=len(cases), note="")
        for case, small in zip(cases, near, strict=True):
            reasons = kernel_registry.available(case.op, device.type, config.model, dtype)
            for name in (name for name, reason in reasons.items() if reason is None):
                bar.update(task, note=f"{case.title}: {name}")
                figures.append(_measure(case, small, name, device, repeats))
            bar.update(task, advance=1)
    return {
        "preset": config.name,
        "seq_len": config.data.seq_len,
        "precision": config.precision,
        **describe_machine(device),
        "kernels": figures,
    }


def _measure(case: Case, small: Case, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"op": case.op, "input": case.title, "backend": name}
    backend, reference = _backend(case.op, name, device), _backend(case.op, "reference", device)
    try:
        with oom_context(f"{case.title}, {name}"):
            difference = _difference(small, backend, reference)
            figures |= {**_times_and_rates(case, backend, device, repeats), "difference": difference}
    except RunError as error:
        figures["problem"] = str(error)
    reset_memory(device)
    return figures


def _backend(op: str, name: str, device: torch.device) -> Any:
    kernels = choose_kernels(device.type, {op: name})
    if kernels.names[op] != name:
        raise UserError(f"the environment variable FUSIONTREE_{op.upper()} sets the back-end of {op}; unset it")
    return getattr(kernels, op)


def _times_and_rates(case: Case, backend: Any, device: torch.device, repeats: int) -> dict[str, float | None]:
    """Return the median times of forward and of forward plus backward, and the rates."""
    inputs = case.inputs()
    learned = [value for value in inputs if value.requires_grad]
    outputs = case.call(backend, inputs)
    gradients = [torch.ones_like(output) for output in outputs]
    bytes_moved = sum(value.nbytes for value in [*inputs, *outputs])
    del outputs

    def both() -> None:
        torch.autograd.grad(case.call(backend, inputs), learned, gradients)

    def forward() -> None:
        with torch.no_grad():
            case.call(backend, inputs)

    unit, work = ("tb", bytes_moved) if case.flops is None else ("tflop", case.flops)
    figures: dict[str, float | None] = {}
    for title, run, passes in (("forward", forward, 1), ("both", both, 3)):
        seconds = _median(run, device, repeats) if learned or passes == 1 else None
        figures[f"{title}_ms"] = None if seconds is None else seconds * 1e3
        figures[f"{title}_{unit}_per_s"] = None if seconds is None else passes * work / seconds / 1e12
    return figures


def _median(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    run()  # compilation and autotuning
    return statistics.median(elapsed(device, run) for _ in range(repeats))


def _difference(case: Case, backend: Any, reference: Any) -> float:
    """Return the largest difference of outputs and gradients from the fp32 reference, each relative to its largest."""
    inputs = case.inputs()
    exact = [
        value.detach().float().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in inputs
    ]
    worst = 0.0
    results = _outputs_and_gradients(case, backend, inputs)
    for value, true in zip(results, _outputs_and_gradients(case, reference, exact), strict=True):
        worst = max(worst, ((value.float() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item())
    return worst


def _outputs_and_gradients(case: Case, backend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return all outputs, and the gradients of a fixed random weighting of the outputs."""
    outputs = case.call(backend, inputs)
    learned = [value for value in inputs if value.requires_grad]
    if not learned:
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, learned, weights)]


# --- the operations' inputs ------------------------------------------------------------------------------------------


Draw = Callable[..., Tensor]


def _cases(model: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    packed, single = (_documents(kind, seq_len, device) for kind in ("packed", "single"))
    cases = [_scan(model, packed, device, dtype), _convolution(model, packed, device, dtype)]
    for heads, kv_heads, window in (
        (model.global_heads, model.global_kv_heads, None),
        (model.num_heads - model.global_heads, model.num_kv_heads - model.global_kv_heads, model.window),
    ):
        if heads:
            title = f"{heads} heads, {'global' if window is None else f'window {window}'}"
            for kind, documents in (("packed", packed), ("single", single)):
                shape = heads, kv_heads, model.head_dim
                cases.append(_attention(f"attention, {title}, {kind}", shape, window, documents, device, dtype))
            cases.append(_prefill(title, (heads, kv_heads, model.head_dim), window, seq_len, device, dtype))
            cases.append(_decode(title, (heads, kv_heads, model.head_dim), window or seq_len, device, dtype))
    return [*cases, _loss(model, seq_len, device, dtype), *_pointwise(model, packed, device, dtype)]


def _documents(kind: rows.Documents, seq_len: int, device: torch.device) -> Documents:
    return to_device(rows.synthetic_batch(kind, 1, seq_len, 2, (0,)), device)[2]


def _drawer(device: torch.device, dtype: torch.dtype) -> Draw:
    """Return a seeded function that draws normal leaf tensors which require a gradient."""
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

    def call(scan: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [scan(*values, documents.seq_idx, chunk_size=model.chunk_size)[0]]

    return Case("scan", f"scan, {H} heads of {P}, state {S}, packed", call, inputs)


def _convolution(model: ModelConfig, documents: Documents, device: torch.device, dtype: torch.dtype) -> Case:
    L, channels, taps = documents.seq_idx.shape[1], model.conv_size, model.conv_kernel

    def inputs() -> list[Tensor]:
        draw, fp32 = _drawer(device, dtype), torch.float32
        weights = draw(channels, taps, scale=0.5, in_dtype=fp32), draw(channels, scale=0.5, in_dtype=fp32)
        return [draw(1, L, channels), *weights]

    def call(convolution: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [convolution(*values, documents.seq_idx)]

    return Case("convolution", f"convolution, {channels} channels, {taps} taps, packed", call, inputs)


def _attention(
    title: str,
    shape: tuple[int, int, int],
    window: int | None,
    documents: Documents,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    heads, kv_heads, D = shape

    def inputs() -> list[Tensor]:
        draw, L = _drawer(device, dtype), documents.seq_idx.shape[1]
        return [draw(1, L, count, D) for count in (heads, kv_heads, kv_heads)]

    def call(attention: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [attention(*values, documents, window)]

    pairs = sum(flops.visible_pairs(length, window) for length in documents.cu_seqlens.diff().tolist())
    return Case("attention", title, call, inputs, flops=4 * D * heads * pairs)


def _prefill(
    heads_title: str,
    shape: tuple[int, int, int],
    window: int | None,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    """Build the attention of a prompt's last quarter to all its tokens, or to those within the window."""
    (heads, kv_heads, D), new = shape, max(2, seq_len // 4)
    seen = seq_len if window is None else min(seq_len, window + new)

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        return [
            draw(1, tokens, count, D).detach() for tokens, count in ((new, heads), (seen, kv_heads), (seen, kv_heads))
        ]

    def call(prefill: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [prefill(*values, window)]

    pairs = flops.visible_pairs(seq_len, window) - flops.visible_pairs(seq_len - new, window)
    return Case("prefill", f"a later piece's attention, {heads_title}", call, inputs, flops=4 * D * heads * pairs)


def _decode(heads_title: str, shape: tuple[int, int, int], seen: int, device: torch.device, dtype: torch.dtype) -> Case:
    heads, kv_heads, D = shape

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        q, k, v = draw(1, 1, heads, D), draw(1, seen, kv_heads, D), draw(1, seen, kv_heads, D)
        visible = torch.ones(1, seen, dtype=torch.bool, device=device)
        return [q.detach(), k.detach(), v.detach(), visible, torch.tensor([seen], device=device)]

    def call(decode: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [decode(*values)]

    return Case("decode", f"one token's attention, {heads_title}, {seen} cached", call, inputs)


def _loss(model: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> Case:
    H, V = model.hidden_size, model.vocab_size
    labels = torch.randint(V, (seq_len,), generator=torch.Generator(device).manual_seed(1), device=device)

    def inputs() -> list[Tensor]:
        draw = _drawer(device, dtype)
        return [draw(seq_len, H), draw(V, H, scale=H**-0.5, in_dtype=torch.float32)]

    def call(loss: Any, values: Sequence[Tensor]) -> list[Tensor]:
        return [loss(*values, labels)[0]]

    return Case("loss", f"loss head, {H} to {V}", call, inputs, flops=2 * V * H * seq_len)


def _pointwise(model: ModelConfig, documents: Documents, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Build a case for each pointwise function, called as in training."""
    L, H, N, K, D = documents.seq_idx.shape[1], model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    eps, size, fp32 = model.norm_eps, model.ssm_size, {"in_dtype": torch.float32}
    groups = [kv for kv in (model.global_kv_heads, K - model.global_kv_heads) if kv]
    rotary = rotary_embedding(documents.position_ids, D, model.rope_base)
    real = torch.ones_like(documents.seq_idx, dtype=torch.bool)

    def split_heads(pieces: Any, v: Sequence[Tensor]) -> list[Tensor]:
        return [part for kind in pieces.attention_inputs(*v, rotary, eps, groups) for part in kind]

    # title, call, and the inputs' shapes: activations of one row, fp32 parameters
    table: list[tuple[str, Callable[[Any, Sequence[Tensor]], list[Tensor]], list[list[int]], list[list[int]]]] = [
        ("norm with time", lambda p, v: list(p.norm_with_time(*v, eps)), [[H], [H]], [[H]]),
        ("attention inputs", split_heads, [[(N + 2 * K) * D]], [[D], [D]]),
        (
            "joined norm",
            lambda p, v: [p.joined_norm(list(v[:-1]), v[-1], eps)],
            [[kv * model.queries_per_kv, D] for kv in groups],
            [[N * D]],
        ),
        ("time step", lambda p, v: [p.time_step(*v)], [[model.ssm_heads]], [[model.ssm_heads]]),
        ("gated norm", lambda p, v: [p.gated_norm(*v, eps)], [[size], [size]], [[size]]),
        (
            "fuse",
            lambda p, v: list(p.fuse(*v[:3], tuple(v[3:6]), real, v[6], eps)[:2]),
            [[H]] * 3,
            [[model.gate_rank, 2 * H], [H, model.gate_rank], [H], [H]],
        ),
        ("SwiGLU", lambda p, v: [p.swiglu(*v)], [[2 * model.mlp_size]], []),
    ]

    def case(title: str, call: Any, activations: list[list[int]], parameters: list[list[int]]) -> Case:
        def inputs() -> list[Tensor]:
            draw = _drawer(device, dtype)
            return [
                *(draw(1, L, *shape) for shape in activations),
                *(draw(*shape, scale=shape[-1] ** -0.5 if len(shape) > 1 else 1.0, **fp32) for shape in parameters),
            ]

        return Case("pointwise", title, call, inputs)

    return [case(*row) for row in table]
