"""The chunked scan equals the recurrence in outputs, gradients and states; the convolution equals its sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.model.reference import convolution, scan_chunked, scan_sequential


def inputs(seed: int, B: int, L: int, H: int, P: int, G: int, S: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dt, A = normal(B, L, H).sigmoid(), -normal(H).exp()
    return [normal(B, L, H, P), dt, A, normal(B, L, G, S), normal(B, L, G, S), normal(H)]


def numbered(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


def cut_anywhere(seed: int, B: int, L: int, often: float) -> torch.Tensor:
    """Draw document indices, int32 [B, L]; in each row a document starts at a token with probability `often`."""
    return (torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < often).cumsum(1).int()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    L=st.integers(1, 150),
    often=st.sampled_from([0.0, 0.03, 0.5]),
    groups=st.sampled_from([(1, 1), (1, 3), (2, 2)]),
    chunk=st.sampled_from([1, 7, 16, 64]),
)
def test_chunks_equal_the_recurrence(
    seed: int, B: int, L: int, often: float, groups: tuple[int, int], chunk: int
) -> None:
    G, per_group = groups
    args, seq = inputs(seed, B, L, G * per_group, 4, G, 6), cut_anywhere(seed, B, L, often)
    y, state = scan_chunked(*args, seq, chunk_size=chunk)
    y_ref, state_ref = scan_sequential(*args, seq)
    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)  # fp32 sums of up to 150 terms in a different order
    torch.testing.assert_close(state, state_ref, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    L=st.integers(1, 12),
    often=st.sampled_from([0.0, 0.2, 0.6]),
    channels=st.integers(1, 5),
    taps=st.integers(1, 5),
)
def test_the_convolution_sums_taps_within_the_document(
    seed: int, B: int, L: int, often: float, channels: int, taps: int
) -> None:
    generator, seq = torch.Generator().manual_seed(seed), cut_anywhere(seed, B, L, often)
    x, weight, bias = (torch.randn(*n, generator=generator) for n in ((B, L, channels), (channels, taps), (channels,)))
    total = bias.repeat(B, L, 1)
    for row in range(B):
        for t in range(L):
            for back in range(min(taps, t + 1)):
                if seq[row, t - back] == seq[row, t]:
                    total[row, t] += x[row, t - back] * weight[:, taps - 1 - back]
    found = convolution(x, weight, bias, seq)
    torch.testing.assert_close(found, total * total.sigmoid(), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_recurrence() -> None:
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


def test_an_initial_state_continues_its_own_document_only() -> None:
    args = inputs(2, 1, 50, 4, 4, 2, 6)
    seq = numbered([30, 20])
    full, final = scan_chunked(*args, seq, chunk_size=16)
    for cut in (13, 30, 41):
        head = [a[:, :cut] if a.ndim > 1 else a for a in args]
        tail = [a[:, cut:] if a.ndim > 1 else a for a in args]
        first, state = scan_chunked(*head, seq[:, :cut], chunk_size=16)
        second, last = scan_chunked(
            *tail, seq[:, cut:], initial_state=state, initial_seq=seq[:, cut - 1], chunk_size=16
        )
        torch.testing.assert_close(torch.cat([first, second], 1), full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input_and_the_state_is_fp32(dtype: torch.dtype) -> None:
    x, dt, A, B_in, C_out, D = inputs(3, 1, 20, 4, 4, 2, 6)
    y, state = scan_chunked(x.to(dtype), dt, A, B_in.to(dtype), C_out.to(dtype), D, numbered([20]))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
