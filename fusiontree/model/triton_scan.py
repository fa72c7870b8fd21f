"""This project's Triton kernels for the scan: prefix sums of the decay, outputs of the chunks, and their gradients.

Axes: B rows, L tokens, H SSM heads, P SSM head size, G groups, S state size, C chunks, Q tokens per chunk. Offsets are
64-bit and do not overflow. Prefix sums, exponentials and sums are fp32; matrix products take operands in the dtype of x
and accumulate in fp32. Import this file only where Triton is installed.

`backends.py` combines these kernels with mamba-ssm's, which compute the states and the scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # an exported folder must load without Triton; the registry reports this message
    raise ImportError("triton is not installed") from None


@triton.jit
def _add_in_document(left, left_starts, right, right_starts):
    """Combine two segments of a segmented prefix sum: it restarts where a flag is set. Associative."""
    return tl.where(right_starts != 0, right, left + right), left_starts | right_starts


# --- prefix sums -----------------------------------------------------------------------------------------------------


@triton.jit
def _scan_decay_kernel(
    dt, A, seq, dt_out, cumulative, L, H, chunks, stride_b, stride_t,
    Q: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, h = tl.arange(0, BQ), tl.program_id(2) * BH + tl.arange(0, BH)
    t = chunk * Q + q
    real = (q < Q) & (t < L)
    seq += row * L
    starts = real & (q > 0) & (tl.load(seq + t, mask=real) != tl.load(seq + t - 1, mask=real & (t > 0), other=-1))
    starts = tl.broadcast_to(starts.to(tl.int32)[:, None], (BQ, BH))
    pointers = dt + row * stride_b + t.to(tl.int64)[:, None] * stride_t + h[None, :]
    step = tl.load(pointers, mask=real[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
    decay = step * tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    sums, _ = tl.associative_scan((decay, starts), 0, _add_in_document)
    out = (row * H + h[None, :]) * chunks * Q + chunk * Q + q[:, None]
    mask = (q < Q)[:, None] & (h < H)[None, :]
    tl.store(dt_out + out, step, mask=mask)
    tl.store(cumulative + out, sums, mask=mask)


def decay_sums(dt: Tensor, A: Tensor, seq_idx: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Split the time steps into chunks, and compute prefix sums of ``dt·A`` that restart at each document and chunk.

    If the sums continued across documents, the values of one document would affect the rounding of the next.

    Args:
        dt: [B, L, H].
        A: fp32 [H].
        seq_idx: int32 [B, L].

    Returns:
        Time steps and prefix sums, fp32 [B, H, C, Q] each; padding at the end has the time step zero.
    """
    B, L, H = dt.shape
    chunks = triton.cdiv(L, chunk_size)
    dt_out = torch.empty(B, H, chunks, chunk_size, dtype=torch.float32, device=dt.device)
    sums = torch.empty_like(dt_out)
    BH = 8
    _scan_decay_kernel[(B, chunks, triton.cdiv(H, BH))](
        dt, A, seq_idx, dt_out, sums, L, H, chunks, dt.stride(0), dt.stride(1),
        Q=chunk_size, BQ=triton.next_power_of_2(chunk_size), BH=BH,
    )  # fmt: skip
    return dt_out, sums


# --- outputs of the chunks, and the gradients of their inputs --------------------------------------------------------
#
# With scores s_mn = C_m · B_n and prefix sums a, the output of token m is the sum of exp(a_m - a_n)·dt_n·s_mn·x_n over
# the tokens n ≤ m of its chunk and document. A chunk is split into blocks of tokens. If m and n are in different blocks
# and r is the first token of m's block, the exponential is exp(a_m - a_r)·exp(a_r - a_n), and neither factor exceeds 1.
# The matrix product therefore takes the unscaled scores, and the factors scale the vectors before and after it. Only
# blocks on the diagonal need one exponential per pair.
#
# The gradient of the decay needs, for each token k, the sum over all pairs n < k ≤ m. One kernel computes the pairs'
# sums by row, by column and by pair of blocks, in one pass over the products; a second, small kernel turns them into
# the gradient by segmented prefix sums. They are separate because the second needs the results of all blocks.


@triton.jit
def _decay(difference):
    """Return exp(min(difference, 0)).

    Differences are at most 0 within a document. Between documents they may be positive, and the clamp avoids overflow:
    their scores are 0, and 0 · inf would be NaN.
    """
    return tl.exp(tl.minimum(difference, 0.0))


@triton.jit
def _load_vectors(x, t, c, stride, L, SIZE: tl.constexpr):
    return tl.load(x + t[:, None] * stride + c[None, :], mask=(t < L)[:, None] & (c < SIZE)[None, :], other=0.0)


@triton.jit
def _through_state(vectors, state, t, p, stride, L, P: tl.constexpr, S: tl.constexpr, BS: tl.constexpr):
    """Multiply vectors of size S by the transposed state [P, S], in tiles of BS: fp32 [t, p]."""
    out = tl.zeros((t.shape[0], p.shape[0]), tl.float32)
    for start in tl.static_range(0, S, BS):
        c = start + tl.arange(0, BS)
        v = _load_vectors(vectors, t, c, stride, L, S)
        w = tl.load(state + p[None, :] * S + c[:, None], mask=(p < P)[None, :] & (c < S)[:, None], other=0.0)
        out += tl.dot(v, w.to(v.dtype))
    return out


@triton.jit
def _scan_outputs_kernel(
    x, steps, sums, seq, scores, C, states, D, y, L, chunks, H, G,
    x_stride_b, x_stride_t, x_stride_h, C_stride_b, C_stride_t, C_stride_g,
    P: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one block of a chunk, for one head and BP of its P channels."""
    block, h = tl.program_id(0) // tl.cdiv(P, BP), tl.program_id(2)
    row, chunk = (tl.program_id(1) // chunks).to(tl.int64), tl.program_id(1) % chunks
    group, line = h // (H // G), (row * H + h) * chunks + chunk
    n, p = tl.arange(0, BLOCK), tl.program_id(0) % tl.cdiv(P, BP) * BP + tl.arange(0, BP)
    q, here = block * BLOCK + n, (chunk * Q + block * BLOCK + n).to(tl.int64)
    x += row * x_stride_b + h * x_stride_h
    steps += line * Q
    sums += line * Q
    seq += row * L
    scores += ((row * chunks + chunk) * G + group) * Q * Q + q[:, None] * Q
    own, first = tl.load(sums + q), tl.load(sums + block * BLOCK)
    # the state before the chunk is of the document of the previous token; the initial state is of document 0
    before = tl.load(seq + chunk * Q - 1, mask=chunk > 0, other=0)
    resuming = tl.load(seq + here, mask=here < L, other=-1) == before
    C += row * C_stride_b + group * C_stride_g
    states += ((row * chunks + chunk) * H + h) * P * S
    out = _through_state(C, states, here, p, C_stride_t, L, P, S, BS) * tl.where(resuming, tl.exp(own), 0.0)[:, None]
    value = _load_vectors(x, here, p, x_stride_t, L, P)
    weight = tl.load(scores + q[None, :]).to(tl.float32) * _decay(own[:, None] - own[None, :])
    weight = tl.where(n[:, None] >= n[None, :], weight * tl.load(steps + q)[None, :], 0.0)
    out += tl.dot(weight.to(value.dtype), value)
    # the earlier blocks of the chunk
    earlier = tl.zeros((BLOCK, BP), tl.float32)
    for other in range(block):
        o = other * BLOCK + n
        scale = tl.load(steps + o) * _decay(first - tl.load(sums + o))
        scaled = _load_vectors(x, (chunk * Q + o).to(tl.int64), p, x_stride_t, L, P) * scale[:, None]
        earlier += tl.dot(tl.load(scores + o[None, :]), scaled.to(value.dtype))
    out += earlier * _decay(own - first)[:, None] + value.to(tl.float32) * tl.load(D + h).to(tl.float32)
    pointers = y + ((row * L + here[:, None]) * H + h) * P + p[None, :]
    tl.store(pointers, out.to(y.dtype.element_ty), mask=(here < L)[:, None] & (p < P)[None, :])


@triton.jit
def _scan_inputs_backward_kernel(
    x, dy, steps, sums, seq, scores, B, d_states, D, dx, d_steps, d_rows, d_columns, spans, d_D, L, chunks, H, G,
    x_stride_b, x_stride_t, x_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, B_stride_b, B_stride_t, B_stride_g,
    dx_stride_b, dx_stride_t, dx_stride_h,
    P: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute gradients of one block of a chunk, for one head and one piece: BP of its P channels.

    The gradient of x is complete. All others are sums over channels: each piece stores its own, and the host adds them.
    """
    BLOCKS: tl.constexpr = Q // BLOCK
    block, piece, h = tl.program_id(0) // tl.cdiv(P, BP), tl.program_id(0) % tl.cdiv(P, BP), tl.program_id(2)
    row, chunk = (tl.program_id(1) // chunks).to(tl.int64), tl.program_id(1) % chunks
    group, line = h // (H // G), (row * H + h) * chunks + chunk
    n, p = tl.arange(0, BLOCK), piece * BP + tl.arange(0, BP)
    q, here = block * BLOCK + n, (chunk * Q + block * BLOCK + n).to(tl.int64)
    x += row * x_stride_b + h * x_stride_h
    dy += row * dy_stride_b + h * dy_stride_h
    steps += line * Q
    sums += line * Q
    seq += row * L
    scores += ((row * chunks + chunk) * G + group) * Q * Q
    line += piece.to(tl.int64) * tl.num_programs(1) * H  # where this piece stores its sums
    own, step, first = tl.load(sums + q), tl.load(steps + q), tl.load(sums + block * BLOCK)
    value, upstream = _load_vectors(x, here, p, x_stride_t, L, P), _load_vectors(dy, here, p, dy_stride_t, L, P)
    # through the state after the chunk, which the tokens of the chunk's last document enter
    last = tl.load(seq + tl.minimum(chunk * Q + Q, L) - 1)
    resuming = tl.load(seq + here, mask=here < L, other=-1) == last
    B += row * B_stride_b + group * B_stride_g
    d_states += ((row * chunks + chunk) * H + h) * P * S
    kept = tl.where(resuming, _decay(tl.load(sums + Q - 1) - own), 0.0)
    d_drive = _through_state(B, d_states, here, p, B_stride_t, L, P, S, BS) * kept[:, None]
    # pairs within the block; d_drive is the gradient of dt·x
    weight = tl.load(scores + q[:, None] * Q + q[None, :]).to(tl.float32) * _decay(own[:, None] - own[None, :])
    weight = tl.where(n[:, None] >= n[None, :], weight, 0.0)
    d_drive += tl.dot(tl.trans(weight.to(upstream.dtype)), upstream)
    exponents = tl.dot(upstream, tl.trans(value)) * weight * step[None, :]
    exponents = tl.where(n[:, None] > n[None, :], exponents, 0.0)  # the diagonal cancels in exact arithmetic
    rows = tl.sum(exponents, 1) - tl.sum(exponents, 0)
    # pairs with later blocks of the chunk, whose outputs read this block
    columns = tl.zeros((BLOCK,), tl.float32)
    for other in range(block + 1, BLOCKS):
        o = other * BLOCK + n
        edge = tl.load(sums + other * BLOCK)
        scale = _decay(tl.load(sums + o) - edge)
        scaled = _load_vectors(dy, (chunk * Q + o).to(tl.int64), p, dy_stride_t, L, P) * scale[:, None]
        score = tl.load(scores + o[:, None] * Q + q[None, :])
        part = tl.dot(tl.trans(score), scaled.to(upstream.dtype)) * _decay(edge - own)[:, None]
        d_drive += part
        column = tl.sum(part * value.to(tl.float32), 1) * step
        columns += column
        tl.store(spans + (line * BLOCKS + other) * BLOCKS + block, tl.sum(column, 0))
    # pairs with earlier blocks of the chunk, which the outputs of this block read
    earlier = tl.zeros((BLOCK, BP), tl.float32)
    for other in range(block):
        o = other * BLOCK + n
        scale = tl.load(steps + o) * _decay(first - tl.load(sums + o))
        scaled = _load_vectors(x, (chunk * Q + o).to(tl.int64), p, x_stride_t, L, P) * scale[:, None]
        earlier += tl.dot(tl.load(scores + q[:, None] * Q + o[None, :]), scaled.to(value.dtype))
    rows += tl.sum(earlier * upstream.to(tl.float32), 1) * _decay(own - first)
    tl.store(d_rows + line * Q + q, rows)
    tl.store(d_columns + line * Q + q, columns)
    tl.store(d_steps + line * Q + q, tl.sum(d_drive * value.to(tl.float32), 1))
    tl.store(d_D + line * BLOCKS + block, tl.sum(tl.sum(upstream.to(tl.float32) * value.to(tl.float32), 1), 0))
    out = d_drive * step[:, None] + upstream.to(tl.float32) * tl.load(D + h).to(tl.float32)
    pointers = dx + row * dx_stride_b + h * dx_stride_h + here[:, None] * dx_stride_t + p[None, :]
    tl.store(pointers, out.to(dx.dtype.element_ty), mask=(here < L)[:, None] & (p < P)[None, :])


@triton.jit
def _scan_decay_backward_kernel(
    d_rows, d_columns, spans, d_sums, d_last, d_decay, d_steps, steps, A, seq, d_dt, d_A, L, H, chunks,
    Q: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of dt and A of one chunk, for BH heads."""
    BLOCKS: tl.constexpr = Q // BLOCK
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, h = tl.arange(0, Q), tl.program_id(2) * BH + tl.arange(0, BH)
    t, some = chunk * Q + q, (h < H)[:, None]
    line = (row * H + h[:, None]) * chunks + chunk
    index = line * Q + q[None, :]
    inside = tl.broadcast_to(some, (BH, Q))
    seq += row * L
    after = (t + 1 < L) & (q < Q - 1)
    ends = after & (tl.load(seq + t, mask=after, other=0) != tl.load(seq + t + 1, mask=after, other=0))
    # gradients of the prefix sums: each goes to all tokens of its sum, the earlier ones of its chunk and document
    value = tl.load(d_sums + index, mask=inside, other=0.0)
    value += tl.where(q[None, :] == Q - 1, tl.load(d_last + line, mask=some, other=0.0), 0.0)
    stops = tl.broadcast_to(ends.to(tl.int32)[None, :], (BH, Q))
    decay, _ = tl.associative_scan((value, stops), 1, _add_in_document, reverse=True)
    # a pair (m, n) depends on the decay of each token k with n < k ≤ m. Three disjoint cases: m is in k's block
    # (`rows`, in which pairs with m and n at or after k cancel), only n is (`columns`), or neither is (`spans`)
    value = tl.load(d_rows + index, mask=inside, other=0.0)
    stops = tl.broadcast_to((ends | (q % BLOCK == BLOCK - 1)).to(tl.int32)[None, :], (BH, Q))
    pairs, _ = tl.associative_scan((value, stops), 1, _add_in_document, reverse=True)
    decay += pairs
    value = tl.load(d_columns + index - 1, mask=inside & (q % BLOCK != 0)[None, :], other=0.0)
    stops = tl.broadcast_to((q % BLOCK == 0).to(tl.int32)[None, :], (BH, Q))
    pairs, _ = tl.associative_scan((value, stops), 1, _add_in_document)
    decay += pairs
    for m in tl.static_range(2, BLOCKS):
        for n in tl.static_range(m - 1):
            over = tl.load(spans + (line * BLOCKS + m) * BLOCKS + n, mask=some, other=0.0)
            decay += tl.where(((q // BLOCK > n) & (q // BLOCK < m))[None, :], over, 0.0)
    decay += tl.load(d_decay + index, mask=inside, other=0.0)
    step = tl.load(steps + index, mask=inside, other=0.0)
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
    out = d_dt + (row * L + t.to(tl.int64)[None, :]) * H + h[:, None]
    tl.store(out, tl.load(d_steps + index, mask=inside, other=0.0) + decay * rate, mask=inside & (t < L)[None, :])
    tl.store(d_A + (row * chunks + chunk) * H + h, tl.sum(decay * step, 1), mask=h < H)


def chunk_outputs(
    x: Tensor, steps: Tensor, sums: Tensor, scores: Tensor, C: Tensor, states: Tensor, D: Tensor, seq_idx: Tensor
) -> Tensor:
    """Compute the scan's outputs from each token's chunk, the state before it, and D·x (arXiv 2405.21060, section 6).

    Args:
        x: [B, L, H, P], contiguous in the last axis.
        steps, sums: of `decay_sums`.
        scores: ``C_m · B_n``, zero if m and n are in different documents: [B, C, G, Q, Q] in the dtype of x.
        C: [B, L, G, S], contiguous in the last axis.
        states: before each chunk, [B, C, H, P, S].
        D: [H].
        seq_idx: int32 [B, L]; the first state is of document 0.

    Returns:
        [B, L, H, P].
    """
    B, L, H, P = x.shape
    G, S, Q, BLOCK = C.shape[2], C.shape[3], sums.shape[3], _block(sums)
    y = torch.empty(B, L, H, P, dtype=x.dtype, device=x.device)
    BP, BS = _tile(P, 64), _tile(S, 128)
    _scan_outputs_kernel[(Q // BLOCK * triton.cdiv(P, BP), B * sums.shape[2], H)](
        x, steps, sums, seq_idx, scores, C, states.contiguous(), D, y, L, sums.shape[2], H, G,
        *x.stride()[:3], *C.stride()[:3], P=P, BP=BP, S=S, BS=BS, Q=Q, BLOCK=BLOCK, num_stages=1,
    )  # fmt: skip
    return y


class DecayParts(NamedTuple):
    """Sums over pairs (m, n) in a chunk, of which `decay_backward` makes the gradient of the decay."""

    rows: Tensor  # fp32 [B, H, C, Q]: by m, minus the sums by n of pairs in the same block
    columns: Tensor  # fp32 [B, H, C, Q]: by n, over m in later blocks
    spans: Tensor  # fp32 [B, H, C, blocks, blocks]: by the blocks of m and n


def inputs_backward(
    x: Tensor,
    dy: Tensor,
    steps: Tensor,
    sums: Tensor,
    scores: Tensor,
    B: Tensor,
    d_states: Tensor,
    D: Tensor,
    seq_idx: Tensor,
    dx: Tensor,
) -> tuple[Tensor, Tensor, DecayParts]:
    """Compute gradients with respect to x, the time steps and D, through the outputs and the states after the chunks.

    Args:
        dy: gradient of the outputs, like x.
        dx: memory like x, which the gradient of x is written to.
        B: [B, L, G, S].
        d_states: gradient of the state after each chunk, [B, C, H, P, S].
        x, steps, sums, scores, D, seq_idx: as in `chunk_outputs`.

    Returns:
        Gradient of the time steps where they multiply x, fp32 [B, H, C, Q]; gradient of D, fp32 [H]; and the parts of
        the decay's gradient.
    """
    rows, L, H, P = x.shape
    G, S, chunks, Q, BLOCK = B.shape[2], B.shape[3], sums.shape[2], sums.shape[3], _block(sums)
    BP, BS, blocks = _tile(P, 64), _tile(S, 128), Q // BLOCK
    pieces = triton.cdiv(P, BP)
    d_steps, d_rows, d_columns = torch.empty(3, pieces, *sums.shape, dtype=torch.float32, device=x.device)
    spans = torch.empty(pieces, rows, H, chunks, blocks, blocks, dtype=torch.float32, device=x.device)
    d_D = torch.empty(pieces, rows, H, chunks * blocks, dtype=torch.float32, device=x.device)
    _scan_inputs_backward_kernel[(blocks * pieces, rows * chunks, H)](
        x, dy, steps, sums, seq_idx, scores, B, d_states.contiguous(), D, dx, d_steps, d_rows, d_columns, spans, d_D,
        L, chunks, H, G, *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *dx.stride()[:3],
        P=P, BP=BP, S=S, BS=BS, Q=Q, BLOCK=BLOCK, num_stages=1,
    )  # fmt: skip
    own, *parts = (part[0] if pieces == 1 else part.sum(0) for part in (d_steps, d_rows, d_columns, spans))
    return own, d_D.sum((0, 1, 3)).to(D.dtype), DecayParts(*parts)


def decay_backward(
    parts: DecayParts,
    d_sums: Tensor,
    d_last: Tensor,
    d_decay: Tensor,
    d_steps: Tensor,
    steps: Tensor,
    A: Tensor,
    seq_idx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of dt and A, the inputs of `decay_sums`.

    Args:
        parts: of `inputs_backward`.
        d_sums: gradient of the prefix sums through the other kernels, fp32 [B, H, C, Q].
        d_last: gradient of the last prefix sum of each chunk through the state passing, fp32 [B, H, C].
        d_decay: gradient of ``dt·A`` through the chunk states, fp32 [B, H, C, Q].
        d_steps: gradient of the time steps, fp32 [B, H, C, Q].
        steps: of `decay_sums`.
        A: fp32 [H].
        seq_idx: int32 [B, L].

    Returns:
        Gradients of dt, fp32 [B, L, H], and of A, fp32 [H].
    """
    B, H, chunks, Q = d_sums.shape
    L, BH = seq_idx.shape[1], 4
    d_dt = torch.empty(B, L, H, dtype=torch.float32, device=steps.device)
    d_A = torch.empty(B * chunks, H, dtype=torch.float32, device=steps.device)
    _scan_decay_backward_kernel[(B, chunks, triton.cdiv(H, BH))](
        *parts, d_sums.contiguous(), d_last.contiguous(), d_decay.contiguous(), d_steps, steps, A,
        seq_idx, d_dt, d_A, L, H, chunks, Q=Q, BLOCK=_block(steps), BH=BH,
    )  # fmt: skip
    return d_dt, d_A.sum(0)


def _block(sums: Tensor) -> int:
    """Return the number of tokens in a block."""
    return min(64, sums.shape[-1])


def _tile(size: int, largest: int) -> int:
    """Return the tile size for an axis: at least 16, as tensor cores require, and at most `largest`."""
    return min(largest, max(16, triton.next_power_of_2(size)))
