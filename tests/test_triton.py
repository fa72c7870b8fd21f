"""Our Triton kernels equal the pointwise functions that they replace; interpreted where there is no GPU."""

from collections.abc import Callable

import pytest
import torch

from fusiontree.model import pointwise
from fusiontree.model.attention import rotary_embedding
from fusiontree.model.triton_attention import attention_inputs, joined_norm, write_kv
from fusiontree.model.triton_kernels import gated_norm, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outcome(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output and the gradients of the inputs."""
    leaves = [value.to(DEVICE).requires_grad_() for value in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 2, output.numel(), device=DEVICE).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.mark.parametrize("inner", [8, 44, 1100])  # below and above the 1,024 values of one program
def test_swiglu(inner: int) -> None:
    inputs = [torch.randn(2, 5, 2 * inner, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(outcome(swiglu, inputs), outcome(pointwise.swiglu, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "size"), [(5, 16), (5, 40), (5, 600), (550, 16)])  # the last: rows share programs
def test_gated_norm_of_a_strided_gate(tokens: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, size), (2, tokens, 3 * size), (size,))
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]

    def strided(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda y, wide, weight: function(y, wide[..., size : 2 * size], weight, 1e-5)

    found, expected = outcome(strided(gated_norm), inputs), outcome(strided(pointwise.gated_norm), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# one and two kinds of head; sizes that are no power of two; few tokens, and enough for all heads in one program
@pytest.mark.parametrize(("kinds", "D", "tokens"), [([3], 8, 7), ([1, 2], 6, 21), ([2, 1], 24, 1), ([1, 1], 16, 2050)])
def test_queries_and_keys_are_normalized_and_rotated(kinds: list[int], D: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = 4 * sum(kinds)  # two queries to a key-value head
    inputs = [torch.randn(*shape, generator=generator) for shape in ((2, tokens, heads * D + 5), (D,), (D,))]
    positions = torch.randint(1000, (2, tokens), generator=generator).to(DEVICE)
    rotary = rotary_embedding(positions, D, 10_000.0)

    def strided(function: Callable[..., list[tuple[torch.Tensor, ...]]]) -> Callable[..., torch.Tensor]:
        def call(wide: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> torch.Tensor:
            parts = function(wide[..., 2 : 2 + heads * D], q_weight, k_weight, rotary, 1e-5, kinds)
            assert [[t.shape[2] for t in kind] for kind in parts] == [[2 * heads, heads, heads] for heads in kinds]
            return torch.cat([t for kind in parts for t in kind], 2)

        return call

    found, expected = (
        outcome(strided(function), inputs) for function in (attention_inputs, pointwise.attention_inputs)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "D", "tokens"), [([3], 8, 5), ([1, 4], 6, 5), ([3, 2], 24, 300)]
)  # the last: several rows per program
def test_norm_over_all_heads(heads: list[int], D: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, n, D) for n in heads] + [(sum(heads) * D,)]
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)  # the layout that some attention kernels return
    found, expected = (
        outcome(lambda *t, f=function: f(list(t[:-1]), t[-1], 1e-5), inputs)
        for function in (joined_norm, pointwise.joined_norm)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 160])  # below and above the 1,024 values of one program
def test_one_token_is_written_to_its_slot(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 7, heads, 8, generator=generator).to(DEVICE)
    k, v = torch.randn(2, 2, 1, heads, 8, generator=generator).to(DEVICE)
    slot = torch.tensor([5], device=DEVICE)
    k = torch.cat([v, k, v], 2)[:, :, heads : 2 * heads]  # a slice of a wider projection
    expected = keys.clone(), values.clone()
    pointwise.write_kv(*expected, k, v, slot)
    write_kv(keys, values, k, v, slot)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
