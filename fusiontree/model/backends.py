"""Loaders of the kernels, and adapters from other projects' kernels to the signatures of `reference.py`.

Each loader imports its kernel when it is called, not before; `kernel_registry.py` lists them.

Axes: B rows, L tokens, N query heads, K key-value heads, D head size, H SSM heads, P SSM head size, G groups, S state
size, C chunks, Q tokens per chunk. Several third-party kernels compute offsets in 32 bits. A call beyond that is split
in halves over rows, then over heads, both of which are independent.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents
from .loss import IGNORE
from .pointwise import Pointwise
from .split import gradient_allocator

MAX_OFFSET = 2**31 - 1  # largest 32-bit offset, in elements


def fits(elements: int) -> bool:
    """Return whether 32-bit offsets address a tensor that spans `elements`."""
    return elements <= MAX_OFFSET


def _span(t: Tensor) -> int:
    """Count the elements from a tensor's first to its last in memory, including gaps of a strided view."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


# --- state-space scan ------------------------------------------------------------------------------------------------


@lru_cache
def _ssd() -> SimpleNamespace:
    """Load the kernels of the scan: some of mamba-ssm's and our own."""
    imported: dict[str, Any] = {}
    for module, names in {
        "mamba_ssm.ops.triton.ssd_chunk_state": ("_chunk_state_fwd", "_chunk_state_bwd_db"),
        "mamba_ssm.ops.triton.ssd_state_passing": ("_state_passing_fwd", "_state_passing_bwd"),
        "mamba_ssm.ops.triton.ssd_bmm": ("_bmm_chunk_fwd", "_bmm_chunk_bwd"),
        "mamba_ssm.ops.triton.ssd_chunk_scan": (
            "_chunk_scan_bwd_dstates",
            "_chunk_scan_bwd_dC",
            "_chunk_scan_bwd_dcb",
        ),
    }.items():
        loaded = importlib.import_module(module)
        imported |= {name.lstrip("_"): getattr(loaded, name) for name in names}
    from .triton_scan import chunk_outputs, decay_backward, decay_sums, inputs_backward

    own = (chunk_outputs, decay_backward, decay_sums, inputs_backward)
    return SimpleNamespace(**imported, **{function.__name__: function for function in own})


class _Scan(torch.autograd.Function):
    """The chunked scan (state-space duality, arXiv 2405.21060, section 6) from mamba-ssm's kernels and ours.

    mamba-ssm's entry point is not used: its prefix sums of the decay continue across documents, so the values of one
    document affect the rounding of the next. Here they restart in each document; mamba-ssm's kernels, which mask by
    document, allow this. The forward pass also saves the states and scores of the chunks, which mamba-ssm recomputes in
    its backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq: Tensor, initial: Any, Q: int
    ) -> tuple[Tensor, Tensor]:
        ssd, S = _ssd(), B.shape[-1]
        steps, sums = ssd.decay_sums(dt, A, seq, Q)
        states = ssd.chunk_state_fwd(B, x, steps, sums, seq_idx=seq, states_in_fp32=True)
        states, last = ssd.state_passing_fwd(
            states.flatten(-2),
            sums[..., -1],
            initial_states=None if initial is None else initial.flatten(-2),
            seq_idx=seq,
            chunk_size=Q,
            out_dtype=C.dtype,
        )
        states = states.unflatten(-1, (-1, S))
        scores = ssd.bmm_chunk_fwd(C, B, Q, seq_idx=seq, output_dtype=x.dtype)
        y = ssd.chunk_outputs(x, steps, sums, scores, C, states, D, seq)
        ctx.save_for_backward(x, steps, sums, A, B, C, D, seq, states, scores)
        ctx.continued, ctx.allocators = initial is not None, [gradient_allocator(t) for t in (x, B, C)]
        return y, last.unflatten(-1, (-1, S))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, d_last = grads
        ssd = _ssd()
        x, steps, sums, A, B, C, D, seq, states, scores = ctx.saved_tensors
        G, Q = B.shape[2], sums.shape[-1]
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        d_states = ssd.chunk_scan_bwd_dstates(C, sums, dy, seq_idx=seq, dtype=x.dtype)
        d_states, d_chunk_decay, d_initial, states = ssd.state_passing_bwd(
            states.flatten(-2),
            sums[..., -1],
            d_states.flatten(-2),
            dfinal_states=d_last.flatten(-2).contiguous(),
            seq_idx=seq,
            has_initial_states=ctx.continued,
            dstates_dtype=x.dtype,
            states_dtype=x.dtype,
            chunk_size=Q,
        )
        states, d_states = states.unflatten(-1, (-1, B.shape[-1])), d_states.unflatten(-1, (-1, B.shape[-1]))
        dx, dB_out, dC_out = (allocate() for allocate in ctx.allocators)
        d_steps, dD, parts = ssd.inputs_backward(x, dy, steps, sums, scores, B, d_states, D, seq, dx)
        dB, d_decay = ssd.chunk_state_bwd_db(x, steps, sums, d_states, seq_idx=seq, B=B, ngroups=G)
        dC, d_sums = ssd.chunk_scan_bwd_dC(states, sums, dy, seq_idx=seq, C=C, ngroups=G)
        d_scores = ssd.chunk_scan_bwd_dcb(x, steps, sums, dy, seq_idx=seq, ngroups=G)
        ssd.bmm_chunk_bwd(C, d_scores, residual=dB, out=dB_out)
        ssd.bmm_chunk_bwd(B, d_scores.transpose(-1, -2), residual=dC, out=dC_out)
        d_dt, dA = ssd.decay_backward(parts, d_sums, d_chunk_decay, d_decay, d_steps, steps, A, seq)
        if d_initial is not None:
            d_initial = d_initial.unflatten(-1, (-1, B.shape[-1])).float()
        return dx, d_dt, dA, dB_out, dC_out, dD, None, d_initial, None


@lru_cache
def scan_mamba_ssm() -> Callable[..., tuple[Tensor, Tensor]]:
    """Load Mamba-2's scan, made of mamba-ssm's Triton kernels and ours."""
    _ssd()
    return _scan


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D: Tensor,
    seq_idx: Tensor,
    initial_state: Tensor | None = None,
    initial_seq: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Run `reference.scan_chunked` by the kernels of `_ssd`.

    Raises:
        ValueError: one head of one row already exceeds 32-bit offsets.
    """
    if initial_seq is not None:
        seq_idx = seq_idx - initial_seq[:, None]  # the kernels take the initial state as that of document 0
    # a short row needs no full chunk; 16 is the least side of a matrix product on tensor cores
    Q = min(chunk_size, max(16, 1 << (x.shape[1] - 1).bit_length()))
    return _scan_within_limits(x, dt, A, B_in, C_out, D, seq_idx.int().contiguous(), initial_state, Q)


def _scan_within_limits(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq: Tensor, initial: Tensor | None, Q: int
) -> tuple[Tensor, Tensor]:
    rows, L, H, P = x.shape
    G, S = B.shape[2:]
    # elements of the states and scores, allocated in full chunks, and of the shared gradient buffer of x, B and C
    allocated = rows * max(-(-L // Q) * max(H * P * S, G * Q * Q), L * (H * P + 2 * G * S))
    if fits(max(_span(x), _span(B), _span(C), allocated)):
        return _Scan.apply(x, dt, A, B, C, D, seq, initial, Q)
    if rows > 1:
        halves = [slice(0, rows // 2), slice(rows // 2, rows)]
        parts = [
            _scan_within_limits(x[r], dt[r], A, B[r], C[r], D, seq[r], None if initial is None else initial[r], Q)
            for r in halves
        ]
        return torch.cat([y for y, _ in parts]), torch.cat([state for _, state in parts])
    if H == 1:
        raise ValueError(f"one head of a row of {L:,} tokens exceeds the scan's 32-bit offsets; shorten the rows")
    cut = H // G * (G // 2) if G > 1 else H // 2  # at the end of a group, or inside the only group
    parts = []
    for h, g in ((slice(0, cut), slice(0, max(1, G // 2))), (slice(cut, H), slice(G // 2, G))):
        state = None if initial is None else initial[:, h].contiguous()
        bc = B[:, :, g].contiguous(), C[:, :, g].contiguous()
        parts.append(_scan_within_limits(x[:, :, h].contiguous(), dt[:, :, h], A[h], *bc, D[h], seq, state, Q))
    return torch.cat([y for y, _ in parts], 2), torch.cat([state for _, state in parts], 1)


# --- attention -------------------------------------------------------------------------------------------------------


def _attention_by(flash: Callable[..., Any]) -> Callable[..., Tensor]:
    """Adapt the varlen function `flash` of FlashAttention to `reference.attention`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        bounds, longest = documents.cu_seqlens, documents.max_seqlen
        return _within_limits(flash, q, k, v, (bounds, longest), (bounds, longest), window)

    return attention


def _continued_by(flash: Callable[..., Any]) -> Callable[..., Tensor]:
    """Adapt the varlen function `flash` of FlashAttention to `reference.attention_continued`."""

    def attention_continued(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        rows = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        (L, T) = q.shape[1], k.shape[1]
        return _within_limits(flash, q, k, v, (rows * L, L), (rows * T, T), window)

    return attention_continued


_Bounds = tuple[Tensor, int]  # cu_seqlens, int32 [documents + 1], and the length of the longest document in tokens


def _within_limits(
    flash: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, queries: _Bounds, keys: _Bounds, window: int | None
) -> Tensor:
    K = k.shape[2]
    if fits(max(_span(q), _span(k), _span(v), q.numel())):
        reach = {} if window is None or window >= keys[1] else {"window_size": (window - 1, 0)}
        out = flash(
            *(t.flatten(0, 1) for t in (q, k, v)),
            cu_seqlens_q=queries[0],
            cu_seqlens_k=keys[0],
            max_seqlen_q=queries[1],
            max_seqlen_k=keys[1],
            causal=True,
            **reach,
        )
        return (out[0] if isinstance(out, tuple) else out).view_as(q)
    if K == 1:
        raise ValueError("one group of attention heads exceeds the kernel's 32-bit offsets; shorten the rows")
    cut = K // 2
    halves = zip(
        q.tensor_split([q.shape[2] // K * cut], 2), k.tensor_split([cut], 2), v.tensor_split([cut], 2), strict=True
    )
    parts = [tuple(t.contiguous() for t in half) for half in halves]
    return torch.cat([_within_limits(flash, a, b, c, queries, keys, window) for a, b, c in parts], 2)


def attention_flash4() -> Callable[..., Tensor]:
    """Load FlashAttention-4 of the package flash-attn-4."""
    return _attention_by(importlib.import_module("flash_attn.cute").flash_attn_varlen_func)


def attention_flash2() -> Callable[..., Tensor]:
    """Load FlashAttention-2 of the package flash-attn."""
    return _attention_by(importlib.import_module("flash_attn").flash_attn_varlen_func)


def prefill_flash4() -> Callable[..., Tensor]:
    """Load FlashAttention-4 for the later chunks of a prefill."""
    return _continued_by(importlib.import_module("flash_attn.cute").flash_attn_varlen_func)


def prefill_flash2() -> Callable[..., Tensor]:
    """Load FlashAttention-2 for the later chunks of a prefill."""
    return _continued_by(importlib.import_module("flash_attn").flash_attn_varlen_func)


@lru_cache
def attention_flex() -> Callable[..., Tensor]:
    """Compile torch's FlexAttention for masks of windows and documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)  # FlexAttention does not support dynamic lengths
    block = 128  # block size of its masks, in tokens; padding rows to full blocks limits the number of compilations

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        B, L = documents.seq_idx.shape
        pad = -L % block
        seq = F.pad(documents.seq_idx, (0, pad), value=-1)
        reach = L if window is None else window

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (seq[b, i] == seq[b, j]) & (i >= j) & (i - j < reach)

        mask = documents.once(
            ("flex", window),
            lambda: create_block_mask(visible, B, None, L + pad, L + pad, device=q.device, _compile=True),
        )
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)).transpose(1, 2) for t in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)[:, :L]

    return attention


# --- loss head -------------------------------------------------------------------------------------------------------


@lru_cache
def loss_liger() -> Callable[..., tuple[Tensor, Tensor]]:
    """Load Liger's fused linear cross-entropy; it sums the weight's gradient in fp32, the z-loss in hidden's dtype."""
    liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    class Loss(liger):  # type: ignore[misc,valid-type]
        """Liger's loss without its check whether the upstream gradient is 1, which would sync with the device."""

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            d_hidden, d_weight, _ = ctx.saved_tensors  # gradients of the sum
            return d_hidden * grads[0], None if d_weight is None else d_weight * grads[0], *[None] * 10

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        options = (None, None, IGNORE, z_loss, 0.0, "sum", None, z_loss > 0, torch.float32)
        loss, z_sum, *_ = Loss.apply(hidden, weight.to(hidden.dtype), labels, *options)
        return loss, torch.zeros_like(loss) if z_sum is None else z_sum.detach().float()

    return linear_cross_entropy


# --- our Triton kernels, and compiled functions ----------------------------------------------------------------------


def convolution_triton() -> Callable[..., Tensor]:
    """Load this project's Triton convolution."""
    from .triton_kernels import convolution

    return convolution


def decode_triton() -> Callable[..., Tensor]:
    """Load this project's Triton attention of one new token to the cache."""
    from .triton_attention import decode_attention

    return decode_attention


def pointwise_compile() -> Pointwise:
    """Compile the pointwise functions, except those with a faster Triton kernel of our own."""
    importlib.import_module("triton")  # torch.compile generates Triton code for a GPU
    # one process may see prompts of many lengths and models of many shapes; beyond the limit, fullgraph=True raises
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled = Pointwise(*(torch.compile(function, fullgraph=True) for function in Pointwise()))
    from .triton_attention import attention_inputs, joined_norm, write_kv
    from .triton_kernels import gated_norm, swiglu

    own = (attention_inputs, gated_norm, joined_norm, write_kv, swiglu)
    return compiled._replace(**{function.__name__: function for function in own})
