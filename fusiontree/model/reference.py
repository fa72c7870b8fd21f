"""Pure-torch kernels: the specification of every other back-end.

Axes: B rows, L tokens, N query heads, K key-value heads, D head size, H SSM heads, P SSM head size, G groups,
S state size, C chunks, Q tokens per chunk. All kernels are exact at document boundaries: a token of another document
contributes an exact zero to every sum, so a change of it changes no bit of the result.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .documents import Documents

_TILE = 2**26  # query-key pairs per masked call: torch converts the bool mask to a float mask of this size


def _wide(x: Tensor) -> Tensor:
    """Cast to fp32, the precision of all sums; fp64 is kept, for tests that measure rounding."""
    return x if x.dtype == torch.float64 else x.float()


# --- state-space scan ------------------------------------------------------------------------------------------------


def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B_in: Tensor, C_out: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a token of the Mamba-2 recurrence ``h ← exp(dt·A)·h + dt·x⊗B``, ``y = h·C + D·x`` (arXiv 2405.21060, eq. 1).

    Args:
        x: [B, H, P]. dt: [B, H], positive, fp32. A: [H], negative, fp32. B_in, C_out: [B, G, S]. D: [H], fp32.
        state: [B, H, P, S], fp32.

    Returns:
        y [B, H, P] in the dtype of x, and the new state [B, H, P, S] in fp32.
    """
    heads_per_group = x.shape[1] // B_in.shape[1]
    B_heads = _wide(B_in).repeat_interleave(heads_per_group, 1)
    C_heads = _wide(C_out).repeat_interleave(heads_per_group, 1)
    xf = _wide(x)
    decay = torch.exp(dt * A)[..., None, None]
    state = state * decay + (dt[..., None] * xf)[..., None] * B_heads[:, :, None, :]
    y = (state * C_heads[:, :, None, :]).sum(-1) + D[:, None] * xf
    return y.to(x.dtype), state


def scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D: Tensor,
    seq_idx: Tensor,
    initial_state: Tensor | None = None,
    initial_seq: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan token by token: slow and simple, for tests of `scan_chunked`. Arguments and results as there."""
    state, previous = _initial(x, B_in, initial_state, initial_seq)
    outputs = []
    for t in range(x.shape[1]):
        same = (seq_idx[:, t] == previous)[:, None, None, None]
        state = torch.where(same, state, torch.zeros_like(state))
        y, state = scan_step(x[:, t], dt[:, t], A, B_in[:, t], C_out[:, t], D, state)
        outputs.append(y)
        previous = seq_idx[:, t]
    return torch.stack(outputs, 1), state


def scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D: Tensor,
    seq_idx: Tensor,
    initial_state: Tensor | None = None,
    initial_seq: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the Mamba-2 scan by matrix products over chunks (state-space duality, arXiv 2405.21060, section 6).

    Args:
        x: [B, L, H, P]. dt: [B, L, H], positive, fp32. A: [H], negative, fp32. B_in, C_out: [B, L, G, S].
        D: [H], fp32. seq_idx: int [B, L], document of each token; the state is reset to zero at each document's start.
        initial_state: [B, H, P, S], fp32, None for zeros.
        initial_seq: int [B], document of `initial_state`; tokens of other documents do not see that state.
        chunk_size: tokens per chunk, Q.

    Returns:
        y [B, L, H, P] in the dtype of x, and the state after the last token, [B, H, P, S] in fp32.
    """
    B, L, H, P = x.shape
    G, S = B_in.shape[2:]
    Q = min(chunk_size, L)
    pad = -L % Q
    C = (L + pad) // Q
    initial_state, initial_seq = _initial(x, B_in, initial_state, initial_seq)

    xf, dt = _wide(x), _wide(dt)
    seq = torch.cat([seq_idx, seq_idx[:, -1:].expand(B, pad)], 1).view(B, C, Q)
    drive = _chunks(xf * dt[..., None], pad, C)  # dt·x, [B, C, Q, H, P]
    log_decay = _chunks(dt * A, pad, C)  # [B, C, Q, H]
    B_chunks, C_chunks = _chunks(_wide(B_in), pad, C), _chunks(_wide(C_out), pad, C)  # [B, C, Q, G, S]

    # decay from token j to token i of the same chunk, zero across documents: [B, C, H, Q, Q]. Prefix sums restart in
    # each document, by a masked product: differences of plain prefix sums would depend on the rounding of earlier
    # documents
    visible = (seq[..., :, None] == seq[..., None, :]).tril()
    cumulative = (visible.to(log_decay.dtype) @ log_decay).transpose(2, 3)  # [B, C, H, Q]
    exponent = cumulative[..., :, None] - cumulative[..., None, :]
    decay = exponent.masked_fill(~visible[:, :, None], -torch.inf).exp()

    # within the chunk
    scores = torch.einsum("bcigs,bcjgs->bcgij", C_chunks, B_chunks)
    weights = (scores[:, :, :, None] * decay.view(B, C, G, H // G, Q, Q)).view(B, C, H, Q, Q)
    y = weights @ drive.transpose(2, 3)  # [B, C, H, Q, P]

    # the state that each chunk adds at its end, then the state at the end of each chunk, with that of earlier chunks
    to_end = (drive.transpose(2, 3) * decay[:, :, :, -1, :, None]).view(B, C, G, H // G, Q, P)
    added = torch.einsum("bcghqp,bcqgs->bcghps", to_end, B_chunks).reshape(B, C, H, P * S)
    added = torch.cat([initial_state.view(B, 1, H, P * S), added], 1).transpose(1, 2)  # [B, H, C+1, P·S]
    last_seq = torch.cat([initial_seq[:, None], seq[..., -1]], 1)  # [B, C+1]
    chunk_decay = torch.cat([cumulative.new_zeros(B, 1, H), cumulative[..., -1]], 1)  # [B, C+1, H]
    carried = (last_seq[:, :, None] == last_seq[:, None, :]).tril()
    across = (carried.to(chunk_decay.dtype) @ chunk_decay).transpose(1, 2)  # [B, H, C+1]
    exponent = across[..., :, None] - across[..., None, :]
    states = exponent.masked_fill(~carried[:, None], -torch.inf).exp() @ added  # [B, H, C+1, P·S]

    # the state before a chunk is visible to the tokens that continue the last document of the previous chunk
    continues = (seq == last_seq[:, :-1, None])[:, :, None]
    from_start = cumulative.masked_fill(~continues, -torch.inf).exp()  # [B, C, H, Q]
    entering = states[:, :, :-1].transpose(1, 2).reshape(B, C, G, H // G, P, S)
    read = torch.einsum("bcqgs,bcghps->bcghqp", C_chunks, entering).reshape(B, C, H, Q, P)
    y = (y + read * from_start[..., None]).transpose(2, 3).reshape(B, C * Q, H, P)[:, :L]
    y = y + D[:, None] * xf
    return y.to(x.dtype), states[:, :, -1].reshape(B, H, P, S)


def _chunks(value: Tensor, pad: int, chunks: int) -> Tensor:
    """Pad [B, L, ...] with zeros at the end and split it into chunks: [B, C, Q, ...]."""
    if pad:
        value = torch.cat([value, value.new_zeros(value.shape[0], pad, *value.shape[2:])], 1)
    return value.unflatten(1, (chunks, -1))


def _initial(x: Tensor, B_in: Tensor, state: Tensor | None, seq: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before the first token and its document; defaults are zeros of no document, -1."""
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B_in.shape[-1], dtype=_wide(x).dtype)
    if seq is None:
        seq = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
    return state, seq


# --- convolution -----------------------------------------------------------------------------------------------------


def convolution(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """Apply a causal depthwise convolution and SiLU; taps in another document or before the row read zero.

    Args:
        x: [B, L, channels].
        weight: [channels, taps]; the last tap is on the token itself.
        bias: [channels].
        seq_idx: int [B, L], document of each token; never decreases along a row.

    Returns:
        [B, L, channels] in the dtype of x.
    """
    taps = weight.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = x * weight[:, -1] + bias
    for back in range(1, min(taps, x.shape[1])):
        same = (seq_idx[:, back:] == seq_idx[:, :-back]).unsqueeze(-1)
        shifted = x[:, :-back].masked_fill(~same, 0) * weight[:, -1 - back]
        y = y + F.pad(shifted, (0, 0, back, 0))
    return F.silu(y)


# --- attention -------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Compute causal grouped-query attention inside documents, without materializing an L×L matrix.

    Args:
        q: [B, L, N, D].
        k, v: [B, L, K, D].
        documents: of the B rows of L tokens.
        window: tokens that a query sees, its own included; None for the full document.

    Returns:
        [B, L, N, D].
    """
    if window is None or window >= documents.max_seqlen:
        return _attention_per_document(q, k, v, documents.bounds)
    return _attention_blockwise(q, k, v, documents.seq_idx, window)


def _attention_per_document(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    q_flat, k_flat, v_flat = (t.flatten(0, 1).transpose(0, 1) for t in (q, k, v))
    outputs = [
        _sdpa(q_flat[None, :, start:end], k_flat[None, :, start:end], v_flat[None, :, start:end])
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs, 2)[0].transpose(0, 1).view_as(q)


def _attention_blockwise(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor, window: int) -> Tensor:
    """Attend from blocks of `window` queries to their own and the previous block; scores [window, 2·window] each."""
    B, L = seq_idx.shape
    pad = -L % window
    blocks = (L + pad) // window
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
    seq = F.pad(seq_idx, (0, pad), value=-1)

    def with_previous(t: Tensor) -> Tensor:
        """Split [B, L, ...] into [B, blocks, 2·window, ...]; before the first block, the document is -2: none."""
        cut = t.view(B, blocks, window, *t.shape[2:])
        before = torch.cat([torch.full_like(cut[:, :1], -2 if t is seq else 0), cut[:, :-1]], 1)
        return torch.cat([before, cut], 2)

    index = torch.arange(window, device=q.device)
    distance = index[:, None] + window - torch.arange(2 * window, device=q.device)[None]
    same = seq.view(B, blocks, window)[..., None] == with_previous(seq)[..., None, :]
    mask = same & (distance >= 0) & (distance < window)
    y = _sdpa(
        q.view(B * blocks, window, *q.shape[2:]).transpose(1, 2),
        with_previous(k).flatten(0, 1).transpose(1, 2),
        with_previous(v).flatten(0, 1).transpose(1, 2),
        mask.flatten(0, 1)[:, None],
    )
    return y.transpose(1, 2).reshape(B, L + pad, *q.shape[2:])[:, :L]


def attention_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Compute attention of new queries to cached keys.

    Args:
        q: [B, L, N, D].
        k, v: [B, T, K, D].
        mask: bool [B, L, T], true where the query sees the key.

    Returns:
        [B, L, N, D].
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    tile = max(1, _TILE // (mask.shape[0] * mask.shape[2]))
    parts = zip(q.transpose(1, 2).split(tile, 2), mask[:, None].split(tile, 2), strict=True)
    return torch.cat([_sdpa(queries, k, v, seen) for queries, seen in parts], 2).transpose(1, 2)


def attention_continued(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Compute causal attention of a document's last tokens to all its tokens, or to those within the window.

    Args:
        q: [B, L, N, D], one document per row.
        k, v: [B, T, K, D], of the document's last T tokens; T is at least L.
        window: tokens that a query sees, its own included; None for the full document.

    Returns:
        [B, L, N, D].
    """
    L, T = q.shape[1], k.shape[1]
    index = torch.arange(T, device=q.device)
    mask = index <= index[T - L :, None]
    if window is not None:
        mask &= index > index[T - L :, None] - window
    return attention_cached(q, k, v, mask.expand(q.shape[0], -1, -1))


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, length: Tensor) -> Tensor:
    """Compute attention of one new token to the cache.

    Args:
        q: [B, 1, N, D].
        k, v: buffers of the cache, [B, T, K, D].
        visible: bool [B, T], true where the new token sees the key.
        length: int [1], filled slots; later slots are not visible, so a kernel may skip them.

    Returns:
        [B, 1, N, D].
    """
    return attention_cached(q, k, v, visible[:, None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention of [B, N, L, D] to [B, K, T, D] by torch's kernels; causal without a mask.

    torch's math kernel materializes the L×T scores, so it may run only with a mask, whose callers bound this size.
    cuDNN's kernel is excluded: it plans anew for every document length. On a GPU, the kernels need head sizes that are
    multiples of 4 in fp32; others are padded with zeros.
    """
    D = q.shape[-1]
    q, k, v = (F.pad(t, (0, -D % 4)) if D % 4 else t for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if mask is not None:
        allowed.append(SDPBackend.MATH)
    with sdpa_kernel(allowed):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=D**-0.5)[..., :D]


# --- loss head -------------------------------------------------------------------------------------------------------
