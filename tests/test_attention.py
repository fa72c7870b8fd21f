"""The reference attention equals a masked softmax, for any rows, documents, heads and windows."""

import torch
from conftest import documents_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusiontree.model.reference import attention, attention_continued


def dense(q: Tensor, k: Tensor, v: Tensor, seq: Tensor, window: int | None) -> Tensor:
    """Compute attention in fp64 with all scores materialized."""
    L, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 2), v.double().repeat_interleave(groups, 2)
    distance = torch.arange(L)[:, None] - torch.arange(L)
    mask = (seq[:, :, None] == seq[:, None]) & (distance >= 0) & (distance < (L if window is None else window))
    scores = torch.einsum("bind,bjnd->bnij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnij,bjnd->bind", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)


def heads_of(seed: int, B: int, L: int, K: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, L, heads, 8, generator=generator) for heads in (K * groups, K, K)]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3),
    K=st.integers(1, 3),
    groups=st.integers(1, 3),
    window=st.none() | st.integers(1, 40),
)
def test_attention_equals_a_masked_softmax(
    seed: int, rows: list[list[int]], K: int, groups: int, window: int | None
) -> None:
    torch.set_num_threads(1)
    L = max(map(sum, rows))
    documents = documents_of([[*row, *([L - sum(row)] if sum(row) < L else [])] for row in rows])
    q, k, v = heads_of(seed, len(rows), L, K, groups)
    found = attention(q, k, v, documents, window)
    torch.testing.assert_close(found.double(), dense(q, k, v, documents.seq_idx, window), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), L=st.integers(2, 60), new=st.integers(1, 60), window=st.none() | st.integers(1, 40))
def test_continued_attention_equals_full_attention(seed: int, L: int, new: int, window: int | None) -> None:
    torch.set_num_threads(1)
    new = min(new, L)
    q, k, v = heads_of(seed, 2, L, 2, 2)
    reached = slice(0 if window is None else max(0, L - new - window), None)
    found = attention_continued(q[:, L - new :], k[:, reached], v[:, reached], window)
    full = dense(q, k, v, torch.zeros(2, L), window)
    torch.testing.assert_close(found.double(), full[:, L - new :], rtol=1e-4, atol=1e-5)
