"""The chunked scan is the step recurrence: forward, gradients, documents, initial states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.model.reference import scan_chunked, scan_sequential


def inputs(seed: int, B: int, L: int, H: int, P: int, G: int, S: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dt, A = normal(B, L, H).sigmoid(), -normal(H).exp()
    return [normal(B, L, H, P), dt, A, normal(B, L, G, S), normal(B, L, G, S), normal(H)]


def numbered(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    groups=st.sampled_from([(1, 1), (1, 3), (2, 2)]),
    chunk=st.sampled_from([1, 7, 16, 64]),
)
def test_chunks_equal_steps(seed: int, B: int, lengths: list[int], groups: tuple[int, int], chunk: int) -> None:
    G, per_group = groups
    args = inputs(seed, B, sum(lengths), G * per_group, 4, G, 6)
    seq = numbered(lengths).expand(B, -1)
    y, state = scan_chunked(*args, seq, chunk_size=chunk)
    y_ref, state_ref = scan_sequential(*args, seq)
    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)  # fp32 sums of up to 200 terms in another order
    torch.testing.assert_close(state, state_ref, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_the_steps() -> None:
    args = [a.requires_grad_() for a in inputs(1, 2, 45, 4, 4, 2, 6)]
    seq = numbered([20, 3, 22]).expand(2, -1)
    initial = torch.randn(2, 4, 4, 6, requires_grad=True)
    first = torch.zeros(2, dtype=torch.int32)
    gradients = []
    for scan, extra in ((scan_chunked, {"chunk_size": 8}), (scan_sequential, {})):
        y, state = scan(*args, seq, initial_state=initial, initial_seq=first, **extra)
        gradients.append(torch.autograd.grad(y.square().sum() + state.square().sum(), [*args, initial]))
    for chunked, stepped in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, stepped, rtol=1e-3, atol=1e-3)


def test_a_state_continues_its_own_document_only() -> None:
    args = inputs(2, 1, 50, 4, 4, 2, 6)
    seq = numbered([30, 20])
    whole, final = scan_chunked(*args, seq, chunk_size=16)
    for cut in (13, 30, 41):
        head = [a[:, :cut] if a.ndim > 1 else a for a in args]
        tail = [a[:, cut:] if a.ndim > 1 else a for a in args]
        first, state = scan_chunked(*head, seq[:, :cut], chunk_size=16)
        second, last = scan_chunked(
            *tail, seq[:, cut:], initial_state=state, initial_seq=seq[:, cut - 1], chunk_size=16
        )
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input_and_the_state_is_fp32(dtype: torch.dtype) -> None:
    x, dt, A, B_in, C_out, D = inputs(3, 1, 20, 4, 4, 2, 6)
    y, state = scan_chunked(x.to(dtype), dt, A, B_in.to(dtype), C_out.to(dtype), D, numbered([20]))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
