"""Pointwise operations between the matrix products and the kernels: norms, rotations, gates.

Uncompiled, these functions are the specification. Compiled, each is one pass over memory, forward and backward.
Axes: B rows, L tokens, H width, N query heads, K key-value heads, D head size, P SSM head size, G groups, S state size.
Parameters may be in fp32 or a lower precision. Results are in the dtype of the activations unless stated otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import scan_step


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm over the last axis (arXiv 1910.07467): [..., size]."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def norm_with_time(x: Tensor, time: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [B, L, H], and the norm plus the time encoding [B, L, H]."""
    h = norm(x, weight, eps)
    return h, h if time is None else h + time


def attention_inputs(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: tuple[Tensor, Tensor], eps: float, groups: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Apply QK norm and RoPE, and split the heads into global and windowed ones.

    Args:
        qkv: queries, keys and values, [B, L, (N + 2K)·D].
        q_weight, k_weight: of the norms, [D].
        rotary: cosines and sines of `attention.rotary_embedding`.
        eps: of the norms.
        groups: number of key-value heads of each kind, at least 1 each, K in total.

    Returns:
        For each kind: q [B, L, its N, D], k and v [B, L, its K, D].
    """
    D, K = q_weight.shape[0], sum(groups)
    q, k, v = qkv.unflatten(-1, (-1, D)).split([qkv.shape[-1] // D - 2 * K, K, K], 2)
    q, k = rotate(norm(q, q_weight, eps), rotary), rotate(norm(k, k_weight, eps), rotary)
    shared = q.shape[2] // K
    parts = q.split([shared * kv for kv in groups], 2), k.split(groups, 2), v.split(groups, 2)
    return [(a.contiguous(), b.contiguous(), c.contiguous()) for a, b, c in zip(*parts, strict=True)]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head (RoPE), computed in fp32: [B, L, heads, D] in the dtype of x."""
    cos, sin = rotary
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def joined_norm(parts: list[Tensor], weight: Tensor, eps: float) -> Tensor:
    """Return the norm over the concatenated heads of the parts [B, L, heads, D]: [B, L, N·D]."""
    return norm(torch.cat(parts, 2).flatten(-2), weight, eps)


def time_step(dt: Tensor, bias: Tensor) -> Tensor:
    """Return the scan's time step softplus(dt + bias), positive: fp32 [B, L, heads]."""
    return F.softplus(dt.float() + bias)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of y ⊙ silu(z): [B, L, size]."""
    return norm(y * F.silu(z), weight, eps)


def mamba_step(
    xBC: Tensor,
    dt: Tensor,
    tail: Tensor,
    continues: tuple[Tensor, Tensor],
    state: Tensor,
    conv: tuple[Tensor, Tensor],
    scan: tuple[Tensor, Tensor, Tensor],
    groups: int,
) -> Tensor:
    """Run one token through the convolution and the scan, and update `tail` and `state` in place.

    Args:
        xBC: new input of the convolution, [B, 1, channels].
        dt: [B, 1, heads].
        tail: last inputs of the convolution, [B, taps - 1, channels].
        continues: whether each input in `tail`, the newest last, is of the new token's document, bool [B, taps - 1];
            and whether `state` is, bool [B].
        state: of the scan, fp32 [B, heads, P, S].
        conv: weight [channels, taps] and bias [channels].
        scan: A_log, D and dt_bias, fp32 [heads] each.
        groups: G.

    Returns:
        [B, 1, heads, P].
    """
    weight, bias = conv
    A_log, D, dt_bias = scan
    inputs_seen, state_seen = continues
    joined = torch.cat([tail.masked_fill(~inputs_seen[..., None], 0), xBC], 1)
    x = F.silu((joined.float() * weight.T.float()).sum(1) + bias.float()).to(xBC.dtype)
    heads, P, S = state.shape[1:]
    values, B_in, C_out = x.split([heads * P, groups * S, groups * S], -1)
    y, new = scan_step(
        values.unflatten(-1, (heads, P)),
        time_step(dt[:, 0], dt_bias),
        -torch.exp(A_log),
        B_in.unflatten(-1, (groups, S)),
        C_out.unflatten(-1, (groups, S)),
        D,
        state.masked_fill(~state_seen[:, None, None, None], 0),
    )
    tail.copy_(torch.cat([tail, xBC.detach()], 1)[:, 1:])
    state.copy_(new.detach())
    return y[:, None]


def fuse(
    x: Tensor,
    m: Tensor,
    a: Tensor,
    gate: tuple[Tensor | None, Tensor | None, Tensor | None],
    real: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute y = x + 2·(g ⊙ m + (1 − g) ⊙ a) with g = sigmoid(W_up·silu(W_down·[m; a]) + b).

    Args:
        x, m, a: residual stream and outputs of the two branches, [B, L, H] each.
        gate: W_down [rank, 2H] and W_up [H or 1, rank], or None for a gate without input; and b [H or 1], or None for
            no gate: then y = x + m + a.
        real: bool [B, L], tokens that count in the mean of g; None: the mean is not computed.
        weight, eps: of the norm; weight is [H].

    Returns:
        y and its norm, [B, L, H] each, and the mean of g, fp32 [H or 1], or None; 0.5 if no token is real.
    """
    down, up, bias = gate
    if bias is None:
        y = x + (m + a)
        return y, norm(y, weight, eps), None if real is None else x.new_full((1,), 0.5, dtype=torch.float32)
    logits = bias.to(m.dtype).expand(*m.shape[:-1], -1)
    if down is not None and up is not None:
        on_m, on_a = down.to(m.dtype).chunk(2, -1)
        logits = logits + F.linear(F.silu(F.linear(m, on_m) + F.linear(a, on_a)), up.to(m.dtype))
    g = torch.sigmoid(logits)
    y = x + 2 * (a + g * (m - a))
    if real is None:
        return y, norm(y, weight, eps), None
    counted = real.float()[..., None]
    count = counted.sum()
    mean = (g.float() * counted).sum((0, 1)) / count.clamp(min=1)
    return y, norm(y, weight, eps), torch.where(count > 0, mean, 0.5)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y, [B, L, H], and its norm."""
    total = x + y
    return total, norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) ⊙ up of [..., 2·inner], gate first (arXiv 2002.05202): [..., inner]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Write the keys and values of one token, [B, 1, K, D], into the cache, [B, T, K, D], at `slot`, int64 [1]."""
    keys.index_copy_(1, slot, k)
    values.index_copy_(1, slot, v)


class Pointwise(NamedTuple):
    """The functions of this file that a model calls; by default uncompiled."""

    norm_with_time: Callable[..., Any] = norm_with_time
    attention_inputs: Callable[..., Any] = attention_inputs
    joined_norm: Callable[..., Any] = joined_norm
    time_step: Callable[..., Any] = time_step
    gated_norm: Callable[..., Any] = gated_norm
    mamba_step: Callable[..., Any] = mamba_step
    fuse: Callable[..., Any] = fuse
    add_norm: Callable[..., Any] = add_norm
    swiglu: Callable[..., Any] = swiglu
    write_kv: Callable[..., Any] = write_kv
