"""Triton kernels of this project's own: what no library does as we need it, or as fast.

Axes: B rows, L tokens, D channels or head size, N query heads, K key-value heads, T cached tokens. Offsets are 64-bit,
so no size wraps round. Import this file only where Triton is installed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .split import gradient_place

try:
    import triton
    import triton.language as tl
except ImportError:  # the exported folder must load, and say so, where there is none
    raise ImportError("triton is not installed") from None


# --- convolution -----------------------------------------------------------------------------------------------------


TAPS = tl.constexpr(4)  # most taps; fewer are padded with zeros


@triton.jit
def _tap(x, seq, here, t, d, back, L, stride, D: tl.constexpr):
    """Inputs `back` tokens before each, fp32 [tokens, channels]; zero in another document or before the row."""
    s = t - back
    valid = (s >= 0) & (t < L)
    same = tl.load(seq + s, mask=valid, other=-2) == here
    # the load does not wait for the comparison; what it brings from another document is dropped
    value = tl.load(
        x + s.to(tl.int64)[:, None] * stride + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
    )
    return tl.where(same[:, None], value, 0.0).to(tl.float32)


@triton.jit
def _weight(weight, d, back, D: tl.constexpr):
    return tl.load(weight + d * TAPS + (TAPS - 1 - back), mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, seq, y, L, stride_b, stride_t, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(D, BD)
    d = tl.program_id(0) % across * BD + tl.arange(0, BD)
    t = tl.program_id(0) // across * BT + tl.arange(0, BT)
    x += row * stride_b
    seq += row * L
    here = tl.load(seq + t, mask=t < L, other=-1)
    s = tl.zeros((BT, BD), tl.float32) + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        s += _tap(x, seq, here, t, d, back, L, stride_t, D) * _weight(weight, d, back, D)
    out = s * tl.sigmoid(s)
    place = y + (row * L + t.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(place, out.to(y.dtype.element_ty), mask=(t < L)[:, None] & (d < D)[None, :])


@triton.jit
def _conv_inner_kernel(
    x, weight, bias, seq, dy, g, partial, L, stride_b, stride_t, dy_stride_b, dy_stride_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradient before the SiLU, `g`, and this program's part of the gradients of the taps and the bias."""
    row = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(D, BD)
    part, parts = tl.program_id(0) // across, tl.num_programs(0) // across
    d = tl.program_id(0) % across * BD + tl.arange(0, BD)
    inside = d < D
    x += row * stride_b
    seq += row * L
    w0, w1 = _weight(weight, d, 0, D), _weight(weight, d, 1, D)
    w2, w3 = _weight(weight, d, 2, D), _weight(weight, d, 3, D)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((BT, BD), tl.float32)
    sums0, sums1, sums2, sums3 = sums, sums, sums, sums
    for step in range(STEPS):
        t = (part * STEPS + step) * BT + tl.arange(0, BT)
        here = tl.load(seq + t, mask=t < L, other=-1)
        x0, x1 = _tap(x, seq, here, t, d, 0, L, stride_t, D), _tap(x, seq, here, t, d, 1, L, stride_t, D)
        x2, x3 = _tap(x, seq, here, t, d, 2, L, stride_t, D), _tap(x, seq, here, t, d, 3, L, stride_t, D)
        s = b + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        sigmoid = tl.sigmoid(s)
        mask = (t < L)[:, None] & inside[None, :]
        upstream = tl.load(
            dy + row * dy_stride_b + t.to(tl.int64)[:, None] * dy_stride_t + d[None, :], mask=mask, other=0.0
        )
        value = upstream.to(tl.float32) * sigmoid * (1 + s * (1 - sigmoid))
        place = g + (row * L + t.to(tl.int64)[:, None]) * D + d[None, :]
        tl.store(place, value.to(g.dtype.element_ty), mask=mask)
        sums += value
        sums0 += value * x0
        sums1 += value * x1
        sums2 += value * x2
        sums3 += value * x3
    out = partial + (row * parts + part) * (TAPS + 1) * D + d
    tl.store(out, tl.sum(sums3, 0), mask=inside)
    tl.store(out + D, tl.sum(sums2, 0), mask=inside)
    tl.store(out + 2 * D, tl.sum(sums1, 0), mask=inside)
    tl.store(out + 3 * D, tl.sum(sums0, 0), mask=inside)
    tl.store(out + 4 * D, tl.sum(sums, 0), mask=inside)


@triton.jit
def _conv_input_kernel(g, weight, seq, dx, L, stride_b, stride_t, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Gradient of the input: each token collects from those whose taps reached it."""
    row = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(D, BD)
    d = tl.program_id(0) % across * BD + tl.arange(0, BD)
    t = tl.program_id(0) // across * BT + tl.arange(0, BT)
    g += row * L * D
    seq += row * L
    here = tl.load(seq + t, mask=t < L, other=-1)
    total = tl.zeros((BT, BD), tl.float32)
    for ahead in tl.static_range(TAPS):
        s = t + ahead
        same = tl.load(seq + s, mask=s < L, other=-2) == here
        place = g + s.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(place, mask=(s < L)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.where(same[:, None], value, 0.0).to(tl.float32) * _weight(weight, d, ahead, D)
    place = dx + row * stride_b + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    tl.store(place, total.to(dx.dtype.element_ty), mask=(t < L)[:, None] & (d < D)[None, :])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
        ctx.place = gradient_place(x)
        if x.stride(-1) != 1:
            x = x.contiguous()
        B, L, D = x.shape
        ctx.taps = weight.shape[1]
        padded = F.pad(weight, (4 - ctx.taps, 0)).contiguous()
        seq_idx = seq_idx.contiguous()
        y = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
        _conv_forward_kernel[(triton.cdiv(D, 128) * triton.cdiv(L, 32), B)](
            x, padded, bias, seq_idx, y, L, x.stride(0), x.stride(1), D=D, BT=32, BD=128
        )
        ctx.save_for_backward(x, padded, bias, seq_idx)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, bias, seq_idx = ctx.saved_tensors
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        B, L, D = x.shape
        g = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
        dx = ctx.place()
        BT, BD, steps = 8, 128, 64
        parts = triton.cdiv(L, BT * steps)
        partial = torch.empty(B * parts, 5, D, dtype=torch.float32, device=x.device)
        _conv_inner_kernel[(triton.cdiv(D, BD) * parts, B)](
            x, weight, bias, seq_idx, dy, g, partial, L, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
            D=D, BT=BT, BD=BD, STEPS=steps,
        )  # fmt: skip
        _conv_input_kernel[(triton.cdiv(D, 128) * triton.cdiv(L, 16), B)](
            g, weight, seq_idx, dx, L, dx.stride(0), dx.stride(1), D=D, BT=16, BD=128
        )
        *taps, d_bias = partial.sum(0)
        d_weight = torch.stack(taps[4 - ctx.taps :], 1)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None


def convolution(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """`reference.convolution` in one pass over memory forward and two backward; x may be a strided view."""
    return _Convolution.apply(x, weight, bias, seq_idx)


# --- gates -----------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_forward_kernel(x, y, inner, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * stride + c, mask=c < inner, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + inner + c, mask=c < inner, other=0.0).to(tl.float32)
    tl.store(y + row * inner + c, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=c < inner)


@triton.jit
def _swiglu_backward_kernel(x, dy, dx, inner, stride, dy_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * stride + c, mask=c < inner, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + inner + c, mask=c < inner, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * dy_stride + c, mask=c < inner, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    place = dx + row * 2 * inner + c
    tl.store(place, d_gate.to(dx.dtype.element_ty), mask=c < inner)
    tl.store(place + inner, (upstream * gate * sigmoid).to(dx.dtype.element_ty), mask=c < inner)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        x = _rows(gate_up)
        inner = x.shape[1] // 2
        y = torch.empty(*gate_up.shape[:-1], inner, dtype=x.dtype, device=x.device)
        _swiglu_forward_kernel[(len(x), triton.cdiv(inner, 1024))](x, y, inner, x.stride(0), BLOCK=1024)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, _rows(grads[0])
        inner = x.shape[1] // 2
        dx = torch.empty(*grads[0].shape[:-1], 2 * inner, dtype=x.dtype, device=x.device)
        _swiglu_backward_kernel[(len(x), triton.cdiv(inner, 1024))](
            x, dy, dx, inner, x.stride(0), dy.stride(0), BLOCK=1024
        )
        return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """`pointwise.swiglu` at the speed of memory, its gradient too: a compiler writes the two halves at half of that."""
    return _SwiGLU.apply(gate_up)


def _rows(x: Tensor) -> Tensor:
    """[..., size] as a matrix whose rows lie whole in memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -2)


@triton.jit
def _gated_norm_forward_kernel(y, z, weight, out, inverse, size, y_stride, z_stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    value = tl.load(y + row * y_stride + c, mask=c < size, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_stride + c, mask=c < size, other=0.0).to(tl.float32)
    gated = value * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / size + eps)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + c, (gated * scale * w).to(out.dtype.element_ty), mask=c < size)
    tl.store(inverse + row, scale)


@triton.jit
def _gated_norm_backward_kernel(
    y, z, weight, inverse, d_out, dy, dz, d_weight, rows, size, y_stride, z_stride, d_stride, dz_stride,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some rows' gradients, and their part of the weight's."""
    first, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        row = (first + step * programs).to(tl.int64)
        inside = c < tl.where(row < rows, size, 0)
        value = tl.load(y + row * y_stride + c, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_stride + c, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(d_out + row * d_stride + c, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + tl.minimum(row, rows - 1))
        sigmoid = tl.sigmoid(gate)
        normed = value * gate * sigmoid * scale
        sums += upstream * normed
        weighted = upstream * w
        d_gated = scale * (weighted - normed * (tl.sum(weighted * normed, 0) / size))
        tl.store(dy + row * size + c, (d_gated * gate * sigmoid).to(dy.dtype.element_ty), mask=inside)
        d_gate = d_gated * value * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dz + row * dz_stride + c, d_gate.to(dz.dtype.element_ty), mask=inside)
    tl.store(d_weight + first.to(tl.int64) * size + c, sums, mask=c < size)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.shape, ctx.place = y.shape, gradient_place(z)
        y, z = _rows(y), _rows(z)
        rows, size = y.shape
        out = torch.empty(ctx.shape, dtype=y.dtype, device=y.device)
        inverse = torch.empty(rows, dtype=torch.float32, device=y.device)
        BLOCK = triton.next_power_of_2(size)
        _gated_norm_forward_kernel[(rows,)](
            y, z, weight, out, inverse, size, y.stride(0), z.stride(0), eps, BLOCK=BLOCK, num_warps=_warps(BLOCK)
        )
        ctx.save_for_backward(y, z, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, inverse = ctx.saved_tensors
        d_out = _rows(grads[0])
        rows, size = y.shape
        dy = torch.empty(ctx.shape, dtype=y.dtype, device=y.device)
        dz = ctx.place()
        programs = min(rows, 1056)  # eight for each multiprocessor
        d_weight = torch.empty(programs, size, dtype=torch.float32, device=y.device)
        BLOCK = triton.next_power_of_2(size)
        _gated_norm_backward_kernel[(programs,)](
            y, z, weight, inverse, d_out, dy, dz, d_weight, rows, size, y.stride(0), z.stride(0), d_out.stride(0),
            _rows(dz).stride(0), BLOCK=BLOCK, STEPS=triton.cdiv(rows, programs), num_warps=_warps(BLOCK),
        )  # fmt: skip
        return dy, dz, d_weight.sum(0).to(weight.dtype), None


def _warps(block: int) -> int:
    """Threads enough that each holds 16 values of a row."""
    return max(1, min(16, block // 512))


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`pointwise.gated_norm` in one pass over memory each way; z may be a strided view."""
    return _GatedNorm.apply(y, z, weight, eps)


# --- attention of one new token to the cache -------------------------------------------------------------------------


@triton.jit
def _remember_kernel(keys, values, k, v, slot, row_stride, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row * row_stride + tl.load(slot) * size + i
    tl.store(keys + place, tl.load(k + row * size + i, mask=i < size), mask=i < size)
    tl.store(values + place, tl.load(v + row * size + i, mask=i < size), mask=i < size)


def remember(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """`pointwise.remember` in one launch: decoding one row, what counts is how many there are."""
    B, _, K, D = k.shape
    grid = B, triton.cdiv(K * D, 1024)
    k, v = k.contiguous(), v.contiguous()
    _remember_kernel[grid](keys, values, k, v, slot, keys.stride(0), K * D, BLOCK=1024)


@triton.jit
def _decode_kernel(
    q, k, v, visible, length, part, top, mass, T, scale,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, K,
    G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One stretch of the cache for one row and key-value head: its part of the output, its maximum and mass."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = (pair // K).to(tl.int64), pair % K
    g, d = tl.arange(0, BG), tl.arange(0, D)
    queries = tl.load(q + (pair * G + g[:, None]) * D + d[None, :], mask=(g < G)[:, None], other=0.0)
    k += row * k_stride_b + head * k_stride_h
    v += row * v_stride_b + head * v_stride_h
    highest = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    out = tl.zeros((BG, D), tl.float32)
    end = tl.minimum(tl.load(length).to(tl.int32), T)
    for block in range(BLOCKS):
        t = (split * BLOCKS + block) * BT + tl.arange(0, BT)
        seen = (t < end) & (tl.load(visible + row * T + t, mask=t < end, other=0) != 0)
        keys = tl.load(k + t.to(tl.int64)[None, :] * k_stride_t + d[:, None], mask=seen[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(highest - finite)
        values = tl.load(v + t.to(tl.int64)[:, None] * v_stride_t + d[None, :], mask=seen[:, None], other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = peak
    place = (pair * tl.num_programs(1) + split) * G + g
    tl.store(part + place[:, None] * D + d[None, :], out, mask=(g < G)[:, None])
    tl.store(top + place, highest, mask=g < G)
    tl.store(mass + place, total, mask=g < G)


@triton.jit
def _decode_join_kernel(
    part, top, mass, out, splits, G: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):
    """The stretches' parts, weighed by their masses."""
    pair, g = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, BS), tl.program_id(2) * BD + tl.arange(0, BD)
    place = (pair * splits + s) * G + g
    tops = tl.load(top + place, mask=s < splits, other=float("-inf"))
    peak = tl.max(tops, 0)
    weights = tl.where(tops == float("-inf"), 0.0, tl.exp(tops - tl.where(peak == float("-inf"), 0.0, peak)))
    total = tl.sum(weights * tl.load(mass + place, mask=s < splits, other=0.0), 0)
    parts = tl.load(part + place[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    joined = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + (pair * G + g) * D + d, joined.to(out.dtype.element_ty))


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, length: Tensor) -> Tensor:
    """`reference.decode_attention`, the cache shared out among the multiprocessors (flash-decoding).

    The launch depends on the shapes alone, so it can be captured in a CUDA graph; what lies past `length` is not read.
    """
    B, _, N, D = q.shape
    T, K = k.shape[1:3]
    G, BT = N // K, 64
    splits = max(1, min(triton.cdiv(T, BT), triton.cdiv(132, B * K)))  # a program for each multiprocessor
    blocks = triton.cdiv(triton.cdiv(T, splits), BT)
    splits = triton.cdiv(T, blocks * BT)
    part = torch.empty(B * K, splits, G, D, dtype=torch.float32, device=q.device)
    top, mass = torch.empty(2, B * K, splits, G, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _decode_kernel[(B * K, splits)](
        q.contiguous(), k, v, visible, length, part, top, mass, T, D**-0.5,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), K,
        G=G, BG=max(16, triton.next_power_of_2(G)), D=D, BT=BT, BLOCKS=blocks,
    )  # fmt: skip
    BD = 16  # the join is short: it takes as long as the one program that reads most
    _decode_join_kernel[(B * K, G, D // BD)](
        part, top, mass, out, splits, G=G, D=D, BS=triton.next_power_of_2(splits), BD=BD
    )
    return out
