"""This project's Triton kernels around attention: QK norm with RoPE, the norm of the output, attention when decoding.

Axes: B rows, L tokens, D head size, N query heads, K key-value heads, T cached tokens. Offsets are 64-bit and do not
overflow. Norms, rotations and sums are fp32; matrix products take operands in the dtype of the tensors and accumulate
in fp32. Import this file only where Triton is installed.
"""

from typing import Any

import torch
from torch import Tensor

from .triton_kernels import as_rows, warps_of

try:
    import triton
    import triton.language as tl
except ImportError:  # an exported folder must load without Triton; the registry reports this message
    raise ImportError("triton is not installed") from None


# --- QK norm and RoPE ------------------------------------------------------------------------------------------------
#
# A program handles BT tokens and loops over heads, so the cosines and sines of its tokens are loaded once. RoPE pairs
# channel i with channel i + D / 2, so a head is loaded as two halves, which stay in registers for norm and rotation.


@triton.jit
def _load_halves(x, t, i, stride, tokens, HALF: tl.constexpr):
    """Load both halves of a head, fp32 [tokens, HALF]; zero after the last token."""
    pointers = x + t[:, None] * stride + i[None, :]
    mask = (t < tokens)[:, None] & (i < HALF)[None, :]
    first, second = tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + HALF, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(x, first, second, t, i, stride, tokens, HALF: tl.constexpr):
    pointers = x + t[:, None] * stride + i[None, :]
    mask = (t < tokens)[:, None] & (i < HALF)[None, :]
    tl.store(pointers, first.to(x.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_angles(rotary, t, i, tokens, HALF: tl.constexpr):
    mask = (t < tokens)[:, None] & (i < HALF)[None, :]
    return tl.load(rotary + t[:, None] * HALF + i[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weight(weight, i, HALF: tl.constexpr):
    first = tl.load(weight + i, mask=i < HALF, other=0.0).to(tl.float32)
    return first[None, :], tl.load(weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _inverse_rms(first, second, eps, HALF: tl.constexpr):
    """Compute 1 / RMS of each head."""
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def _heads_forward_kernel(
    qkv, q_weight, k_weight, cos, sin, out, tokens, queries, heads, stride, eps,
    HALF: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate BT tokens of `EACH` heads; the first `queries` heads are queries, the others keys."""
    t, i = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BI)
    c, s = _load_angles(cos, t, i, tokens, HALF), _load_angles(sin, t, i, tokens, HALF)
    q_first, q_second = _load_weight(q_weight, i, HALF)
    k_first, k_second = _load_weight(k_weight, i, HALF)
    begin = tl.program_id(1) * EACH
    for head in range(begin, tl.minimum(begin + EACH, heads)):
        first, second = _load_halves(qkv + head * 2 * HALF, t, i, stride, tokens, HALF)
        scale = _inverse_rms(first, second, eps, HALF)
        first *= scale * tl.where(head < queries, q_first, k_first)
        second *= scale * tl.where(head < queries, q_second, k_second)
        base = out + head * 2 * HALF
        _store_halves(base, first * c - second * s, second * c + first * s, t, i, heads * 2 * HALF, tokens, HALF)


@triton.jit
def _heads_backward_kernel(
    x, weight, cos, sin, d_out, dx, d_weight, tokens, heads, stride, dx_stride, eps,
    HALF: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BT tokens of all heads of one kind, and their contribution to the weight's gradient.

    The weight's gradient is reduced in two steps: each program sums its tokens in fp32, and the host sums the programs.
    That is deterministic; atomic additions would not be.
    """
    t, i = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BI)
    c, s = _load_angles(cos, t, i, tokens, HALF), _load_angles(sin, t, i, tokens, HALF)
    w_first, w_second = _load_weight(weight, i, HALF)
    sums_first = tl.zeros((BT, BI), tl.float32)
    sums_second = sums_first
    for head in range(heads):
        first, second = _load_halves(x + head * 2 * HALF, t, i, stride, tokens, HALF)
        scale = _inverse_rms(first, second, eps, HALF)
        first, second = first * scale, second * scale
        d_first, d_second = _load_halves(d_out + head * 2 * HALF, t, i, heads * 2 * HALF, tokens, HALF)
        d_first, d_second = d_first * c + d_second * s, d_second * c - d_first * s  # the inverse rotation
        sums_first += d_first * first
        sums_second += d_second * second
        d_first, d_second = d_first * w_first, d_second * w_second
        mean = ((tl.sum(d_first * first, 1) + tl.sum(d_second * second, 1)) / (2 * HALF))[:, None]
        d_first, d_second = scale * (d_first - first * mean), scale * (d_second - second * mean)
        _store_halves(dx + head * 2 * HALF, d_first, d_second, t, i, dx_stride, tokens, HALF)
    pointers = d_weight + tl.program_id(0) * 2 * HALF + i
    tl.store(pointers, tl.sum(sums_first, 0), mask=i < HALF)
    tl.store(pointers + HALF, tl.sum(sums_second, 0), mask=i < HALF)


class _AttentionInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Any, eps: float, kinds: list[int]
    ) -> tuple[Tensor, ...]:
        cos, sin = (part.contiguous() for part in rotary)
        x, D, K = as_rows(qkv), q_weight.shape[0], sum(kinds)
        N, BT = x.shape[1] // D - 2 * K, 16
        out = torch.empty(*qkv.shape[:-1], N + K, D, dtype=qkv.dtype, device=qkv.device)
        each = N + K if len(x) >= 4096 else 1  # few tokens: one head per program, to occupy the GPU
        _heads_forward_kernel[(triton.cdiv(len(x), BT), triton.cdiv(N + K, each))](
            x, q_weight, k_weight, cos, sin, out, len(x), N, N + K, x.stride(0), eps,
            HALF=D // 2, BI=triton.next_power_of_2(D // 2), BT=BT, EACH=each,
        )  # fmt: skip
        ctx.save_for_backward(x, q_weight, k_weight, cos, sin)
        ctx.shape, ctx.eps, ctx.queries = qkv.shape, eps, [N // K * heads for heads in kinds]
        v = x[:, (N + K) * D :].view(*qkv.shape[:-1], K, D)
        return *out.split([*ctx.queries, *kinds], 2), *v.split(kinds, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, q_weight, k_weight, cos, sin = ctx.saved_tensors
        D, BT, kinds = q_weight.shape[0], 16, len(ctx.queries)
        dx = torch.empty(ctx.shape, dtype=x.dtype, device=x.device)
        sizes = [grad.shape[-2] * D for grad in grads]
        # (inputs, where their gradient is written, upstream gradient) of q, k and v, each for every kind of head
        slices = list(zip(x.split(sizes, 1), as_rows(dx).split(sizes, 1), grads, strict=True))
        d_weights = []
        for weight, parts in ((q_weight, slices[:kinds]), (k_weight, slices[kinds : 2 * kinds])):
            d_weight = torch.empty(kinds, triton.cdiv(len(x), BT), D, dtype=torch.float32, device=x.device)
            for (inputs, d_inputs, grad), sums in zip(parts, d_weight, strict=True):
                _heads_backward_kernel[(len(sums),)](
                    inputs, weight, cos, sin, grad.contiguous(), d_inputs, sums, len(x), grad.shape[-2], x.stride(0),
                    d_inputs.stride(0), ctx.eps, HALF=D // 2, BI=triton.next_power_of_2(D // 2), BT=BT,
                )  # fmt: skip
            d_weights.append(d_weight.sum((0, 1)).to(weight.dtype))
        for _, d_inputs, grad in slices[2 * kinds :]:
            d_inputs.copy_(grad.reshape(d_inputs.shape))
        return dx, *d_weights, None, None, None


def attention_inputs(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: tuple[Tensor, Tensor], eps: float, groups: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run `pointwise.attention_inputs` in one pass over memory each way.

    The results are views: q and k of one new tensor, v of qkv itself.
    """
    parts = _AttentionInputs.apply(qkv, q_weight, k_weight, rotary, eps, groups)
    kinds = len(groups)
    return list(zip(parts[:kinds], parts[kinds : 2 * kinds], parts[2 * kinds :], strict=True))


# --- norm of attention's output --------------------------------------------------------------------------------------
#
# The outputs of the global and the windowed heads are two tensors, normalized together. A program reads its row from
# both, which saves the concatenation. A row fits into one program: BLOCK is at least its size.


@triton.jit
def _load_joined_row(first, second, row, c, rows, cut, size):
    """Load a row of two concatenated matrices of `cut` and `size - cut` columns; zero after the last row."""
    end = tl.where(row < rows, size, 0)
    left = tl.load(first + row * cut + c, mask=c < tl.minimum(cut, end), other=0.0)
    right = tl.load(second + row * (size - cut) + c - cut, mask=(c >= cut) & (c < end), other=0.0)
    return left + right  # the masks are disjoint: one of the two is zero


@triton.jit
def _joined_norm_forward_kernel(first, second, weight, out, inverse, rows, cut, size, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = _load_joined_row(first, second, row, c, rows, cut, size).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + c, (value * scale * w).to(out.dtype.element_ty), mask=c < size)
    tl.store(inverse + row, scale)


@triton.jit
def _joined_norm_backward_kernel(
    first, second, weight, inverse, d_out, d_first, d_second, d_weight, rows, cut, size, d_stride,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of STEPS rows, and their contribution to the weight's gradient in fp32.

    The next row is loaded before the current one is computed, to hide the latency of memory.
    """
    programs, c = tl.num_programs(0), tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    row = tl.program_id(0).to(tl.int64)
    value = _load_joined_row(first, second, row, c, rows, cut, size)
    upstream = tl.load(d_out + row * d_stride + c, mask=c < size, other=0.0)
    for _ in range(STEPS):
        scale = tl.load(inverse + tl.minimum(row, rows - 1))
        normed, weighted = value.to(tl.float32) * scale, upstream.to(tl.float32)
        end, after = tl.where(row < rows, size, 0), row + programs
        value = _load_joined_row(first, second, after, c, rows, cut, size)
        upstream = tl.load(d_out + after * d_stride + c, mask=c < tl.where(after < rows, size, 0), other=0.0)
        sums += weighted * normed
        weighted *= w
        out = scale * (weighted - normed * (tl.sum(weighted * normed, 0) / size))
        tl.store(d_first + row * cut + c, out.to(d_first.dtype.element_ty), mask=c < tl.minimum(cut, end))
        pointers, right = d_second + row * (size - cut) + c - cut, (c >= cut) & (c < end)
        tl.store(pointers, out.to(d_second.dtype.element_ty), mask=right)
        row = after
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * size + c, sums, mask=c < size)


class _JoinedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, *parts: Tensor) -> Tensor:
        first, second = (part.contiguous() for part in (parts[0], parts[-1]))  # the same tensor for one kind of head
        rows, cut, size = parts[0][..., 0, 0].numel(), parts[0].shape[-2] * parts[0].shape[-1], weight.shape[0]
        out = torch.empty(*parts[0].shape[:-2], size, dtype=first.dtype, device=first.device)
        inverse = torch.empty(rows, dtype=torch.float32, device=first.device)
        BLOCK = triton.next_power_of_2(size)
        _joined_norm_forward_kernel[(rows,)](
            first, second, weight, out, inverse, rows, cut, size, eps, BLOCK=BLOCK, num_warps=warps_of(BLOCK)
        )
        ctx.save_for_backward(first, second, weight, inverse)
        ctx.kinds = len(parts)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first, second, weight, inverse = ctx.saved_tensors
        d_out, (rows, size) = as_rows(grads[0]), (len(inverse), weight.shape[0])
        d_first = torch.empty_like(first)
        d_second = torch.empty_like(second) if ctx.kinds > 1 else d_first
        programs, BLOCK = min(rows, 528), triton.next_power_of_2(size)  # four per multiprocessor of an H100
        d_weight = torch.empty(programs, size, dtype=torch.float32, device=first.device)
        _joined_norm_backward_kernel[(programs,)](
            first, second, weight, inverse, d_out, d_first, d_second, d_weight, rows, first[0, 0].numel(), size,
            d_out.stride(0), BLOCK=BLOCK, STEPS=triton.cdiv(rows, programs), num_warps=warps_of(BLOCK, 8),
        )  # fmt: skip
        return d_weight.sum(0).to(weight.dtype), None, *(d_first, d_second)[: ctx.kinds]


def joined_norm(parts: list[Tensor], weight: Tensor, eps: float) -> Tensor:
    """Run `pointwise.joined_norm` on one or two parts without concatenating them."""
    return _JoinedNorm.apply(weight, eps, *parts)


# --- decoding: attention of one new token to the cache ---------------------------------------------------------------
#
# Flash-decoding (https://pytorch.org/blog/flash-decoding): one token has too few heads to occupy a GPU, so the cache is
# split among programs. Each computes the softmax over its split with its own maximum; a second kernel combines the
# splits. Maxima, sums and outputs are fp32.


@triton.jit
def _write_kv_kernel(keys, values, k, v, slot, row_stride, k_stride, v_stride, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = row * row_stride + tl.load(slot) * size + i
    tl.store(keys + offset, tl.load(k + row * k_stride + i, mask=i < size), mask=i < size)
    tl.store(values + offset, tl.load(v + row * v_stride + i, mask=i < size), mask=i < size)


def _contiguous_heads(x: Tensor) -> Tensor:
    """Return [B, 1, heads, D] with the heads of a row contiguous in memory; a view if they already are."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Run `pointwise.write_kv` in one launch: with few rows, decoding time is dominated by the number of launches."""
    B, _, K, D = k.shape
    grid = B, triton.cdiv(K * D, 1024)
    k, v = _contiguous_heads(k), _contiguous_heads(v)
    _write_kv_kernel[grid](keys, values, k, v, slot, keys.stride(0), k.stride(0), v.stride(0), K * D, BLOCK=1024)


@triton.jit
def _decode_kernel(
    q, k, v, visible, length, part, top, mass, T, scale,
    q_stride_b, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, K,
    G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the cache, for one row and key-value head and its G query heads.

    Stores the unnormalized output (`part`), the maximum score (`top`) and the sum of the weights (`mass`).
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = (pair // K).to(tl.int64), pair % K
    g, d = tl.arange(0, BG), tl.arange(0, D)
    q += row * q_stride_b + head * G * D
    queries = tl.load(q + g[:, None] * D + d[None, :], mask=(g < G)[:, None], other=0.0)
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
        # online softmax; a block without visible keys has the maximum -inf, for which exp must not see inf - inf
        peak = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(highest - finite)
        values = tl.load(v + t.to(tl.int64)[:, None] * v_stride_t + d[None, :], mask=seen[:, None], other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = peak
    index = (pair * tl.num_programs(1) + split) * G + g
    tl.store(part + index[:, None] * D + d[None, :], out, mask=(g < G)[:, None])
    tl.store(top + index, highest, mask=g < G)
    tl.store(mass + index, total, mask=g < G)


@triton.jit
def _decode_join_kernel(
    part, top, mass, out, splits, G: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):
    """Combine the splits of one query head, for BD channels: rescale to the common maximum, sum, normalize."""
    pair, g = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, BS), tl.program_id(2) * BD + tl.arange(0, BD)
    index = (pair * splits + s) * G + g
    tops = tl.load(top + index, mask=s < splits, other=float("-inf"))
    peak = tl.max(tops, 0)
    weights = tl.where(tops == float("-inf"), 0.0, tl.exp(tops - tl.where(peak == float("-inf"), 0.0, peak)))
    total = tl.sum(weights * tl.load(mass + index, mask=s < splits, other=0.0), 0)
    parts = tl.load(part + index[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    joined = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + (pair * G + g) * D + d, joined.to(out.dtype.element_ty))


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, length: Tensor) -> Tensor:
    """Run `reference.decode_attention`, split over the cache (flash-decoding).

    The launch depends on the shapes only, so it can be captured in a CUDA graph. Keys and values after `length` are not
    read.
    """
    B, _, N, D = q.shape
    T, K = k.shape[1:3]
    G, BT = N // K, 64
    splits = max(1, min(triton.cdiv(T, BT), triton.cdiv(132, B * K)))  # one program per multiprocessor of an H100
    blocks = triton.cdiv(triton.cdiv(T, splits), BT)
    splits = triton.cdiv(T, blocks * BT)
    part = torch.empty(B * K, splits, G, D, dtype=torch.float32, device=q.device)
    top, mass = torch.empty(2, B * K, splits, G, dtype=torch.float32, device=q.device)
    q, out = _contiguous_heads(q), torch.empty_like(q, memory_format=torch.contiguous_format)
    _decode_kernel[(B * K, splits)](
        q, k, v, visible, length, part, top, mass, T, D**-0.5, q.stride(0),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), K,
        G=G, BG=max(16, triton.next_power_of_2(G)), D=D, BT=BT, BLOCKS=blocks,
    )  # fmt: skip
    BD = 16  # small: the duration is that of one program, so each reads little
    _decode_join_kernel[(B * K, G, D // BD)](
        part, top, mass, out, splits, G=G, D=D, BS=triton.next_power_of_2(splits), BD=BD
    )
    return out
