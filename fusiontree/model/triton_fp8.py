"""FP8 products of linear layers in training. Axes: M tokens, K inputs, N outputs.

A layer computes y = x·Wᵀ, and its backward pass dx = dy·W and dW = dyᵀ·x. All three run in E4M3 (arXiv 2209.05433)
with a bf16 result:

- y and dx: x and dy have one scale per token, so an outlier costs the precision of its own token only. W has one scale.
  The sums are those of the tensor cores' fast accumulation, which does not keep all bits.
- dW: it sums over tokens, so their scales cannot be factored out; x and dy have one scale each. Accumulated in fp32.

Scales follow from the current values: the greatest magnitude becomes 448, the greatest finite E4M3 value. A value that
is not finite becomes NaN, so the run's check for such gradients still works. Below ZeRO-3 the fp32 master weights are
cast once per update, in both layouts that the products need; at ZeRO-3 the gathered weights are cast in each pass.
Triton and a GPU of compute capability 8.9 or later are required.
"""

import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("triton is not installed") from None

E4M3 = torch.float8_e4m3fn
GREATEST = tl.constexpr(448.0)  # finite value of E4M3
SMALLEST = tl.constexpr(1e-12)  # magnitude that may become GREATEST: it bounds the scale of zeros
_TILE = 64


# --- casts -----------------------------------------------------------------------------------------------------------


@triton.jit
def _cast_rows_kernel(x, factor, out, scales, amax, stride, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    values = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), 0), SMALLEST)
    tl.store(out + row * K + columns, (values * (GREATEST / largest)).to(tl.float8e4nv), mask=mask)
    tl.store(scales + row, largest / GREATEST * tl.load(factor))
    tl.atomic_max(amax, largest)


def cast_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast `x`, [M, K], with one scale per row.

    Args:
        x: bf16 or fp32 values.
        factor: fp32 (), by which all scales are multiplied.

    Returns:
        The values, E4M3 [M, K]; their scales, fp32 [M, 1]; the scale that suits all rows, without `factor`, fp32 ().
    """
    M, K = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(M, K, dtype=E4M3, device=x.device)
    scales = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(K)
    warps = min(max(block // 512, 1), 16)
    _cast_rows_kernel[(M,)](x, factor, out, scales, amax, x.stride(0), K, BLOCK=block, num_warps=warps)
    return out, scales, scale_of(amax)


def scale_of(amax: Tensor) -> Tensor:
    """Return the scale that maps the magnitude `amax`, fp32 (), to the greatest E4M3 value."""
    return amax.clamp(min=SMALLEST.value) / GREATEST.value


@triton.jit
def _cast_tiles_kernel(x, scale, out, M, K, stride, TRANSPOSED: tl.constexpr, TILE: tl.constexpr):
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    values = tl.load(x + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    values = (values / tl.load(scale)).to(tl.float8e4nv)
    if TRANSPOSED:
        tl.store(out + columns[:, None] * M + rows[None, :], tl.trans(values), mask=tl.trans(mask))
    else:
        tl.store(out + rows[:, None] * K + columns[None, :], values, mask=mask)


def cast_tiles(x: Tensor, scale: Tensor, out: Tensor, transposed: bool = False) -> None:
    """Cast `x`, [M, K], with the one `scale`, fp32 (), by which the values are divided.

    Args:
        x: bf16 or fp32 values; bf16 if `transposed`.
        scale: fp32 ().
        out: E4M3 [M, K], or [K, M] if `transposed`; written.
        transposed: transpose the values.
    """
    M, K = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    grid = triton.cdiv(M, _TILE), triton.cdiv(K, _TILE)
    _cast_tiles_kernel[grid](x, scale, out, M, K, x.stride(0), TRANSPOSED=transposed, TILE=_TILE)


@triton.jit
def _transpose_kernel(x, out, M, K, TILE: tl.constexpr):
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    values = tl.load(x + rows[:, None] * K + columns[None, :], mask=mask)
    tl.store(out + columns[:, None] * M + rows[None, :], tl.trans(values), mask=tl.trans(mask))


def _cast_both(x: Tensor, scale: Tensor, plain: Tensor, transposed: Tensor) -> None:
    """Cast `x`, fp32 or bf16 [M, K], into both layouts.

    The transposition moves bytes: Triton 3.6 compiled a kernel that cast fp32 values and stored them in both layouts
    to code that lost a quarter of the transposed values (on an H200).
    """
    cast_tiles(x, scale, plain)
    M, K = x.shape
    grid = triton.cdiv(M, _TILE), triton.cdiv(K, _TILE)
    _transpose_kernel[grid](plain.view(torch.uint8), transposed.view(torch.uint8), M, K, TILE=_TILE)


def _transposed(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape[1], x.shape[0], dtype=E4M3, device=x.device)
    cast_tiles(x, scale, out, transposed=True)
    return out


# --- products --------------------------------------------------------------------------------------------------------


class Fp8Weight(NamedTuple):
    """The casts of one layer's weights."""

    plain: Tensor  # E4M3 [N, K]
    transposed: Tensor  # E4M3 [K, N]
    scale: Tensor  # fp32 ()


def _cast_weight(weight: Tensor) -> Fp8Weight:
    N, K = weight.shape
    scale = scale_of(weight.abs().amax().float())
    casts = Fp8Weight(weight.new_empty(N, K, dtype=E4M3), weight.new_empty(K, N, dtype=E4M3), scale)
    _cast_both(weight, scale, casts.plain, casts.transposed)
    return casts


@lru_cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(1, count, device=device)


def row_product(rows: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """Return ``(scales ⊙ rows) · columnsᵀ``, bf16 [M, N].

    Args:
        rows: E4M3 [M, K].
        scales: fp32 [M, 1].
        columns: E4M3 [N, K].
    """
    ones = _ones(columns.shape[0], columns.device)
    return torch._scaled_mm(
        rows, columns.t(), scale_a=scales, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def token_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    """Return ``left · rightᵀ``, bf16 [N, K], a sum over tokens.

    Args:
        left: E4M3 [N, M].
        left_scale: fp32 ().
        right: E4M3 [K, M].
        right_scale: fp32 ().
    """
    # the sums are over tens of thousands of tokens
    return torch._scaled_mm(
        left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16, use_fast_accum=False
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cached: Fp8Weight | None) -> Tensor:
        flat = x.flatten(0, -2)
        casts = cached or _cast_weight(weight)
        rows, scales, scale = cast_rows(flat, casts.scale)
        ctx.cached, ctx.shape = cached, x.shape
        ctx.save_for_backward(_transposed(flat, scale), scale, weight)
        return row_product(rows, scales, casts.plain).view(*x.shape[:-1], len(casts.plain))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, x_scale, weight = ctx.saved_tensors
        casts = ctx.cached or _cast_weight(weight)  # ZeRO-3 has gathered the weights again
        dy = gradient.flatten(0, -2)
        rows, scales, scale = cast_rows(dy, casts.scale)
        dx = row_product(rows, scales, casts.transposed).view(ctx.shape)
        return dx, token_product(_transposed(dy, scale), scale, x, x_scale).to(weight.dtype), None


class Fp8Products:
    """The FP8 products of a model's linear layers."""

    def __init__(self, layers: Iterable[Any], cached: bool = True):
        """Let `layers`, each a `Linear`, compute in FP8.

        Args:
            layers: on their device.
            cached: keep the casts of the weights; `refresh` must follow each change of the weights. Else they are cast
                in each product, as ZeRO-3 needs, which has them on the device in the product only.
        """
        self.layers = list(layers)
        self.casts: list[Fp8Weight] = []
        if cached:
            self.casts = [_cast_weight(layer.weight.detach()) for layer in self.layers]
        for layer, casts in itertools.zip_longest(self.layers, self.casts):
            layer.product = lambda x, weight, casts=casts: _Product.apply(x, weight, casts)

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights, if their casts are kept."""
        if not self.casts:
            return
        weights = [layer.weight for layer in self.layers]
        scales = scale_of(torch.stack(torch._foreach_norm(weights, float("inf"))))
        torch._foreach_copy_([casts.scale for casts in self.casts], list(scales.unbind()))
        for weight, casts in zip(weights, self.casts, strict=True):
            _cast_both(weight, casts.scale, casts.plain, casts.transposed)
