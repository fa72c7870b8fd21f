"""Our Triton kernels, in Triton's interpreter where there is no GPU, equal the functions they stand in for."""

from collections.abc import Callable

import pytest
import torch

from fusiontree.model import pointwise
from fusiontree.model.triton_kernels import gated_norm, remember, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outcome(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the inputs' gradients."""
    leaves = [value.to(DEVICE).requires_grad_() for value in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 2, output.numel(), device=DEVICE).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.mark.parametrize("inner", [8, 44, 1100])  # below and above what one program takes
def test_swiglu(inner: int) -> None:
    inputs = [torch.randn(2, 5, 2 * inner, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(outcome(swiglu, inputs), outcome(pointwise.swiglu, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "size"), [(5, 16), (5, 40), (5, 600), (550, 16)])  # the last: several a program
def test_the_gated_norm_of_a_strided_gate(tokens: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, size), (2, tokens, 3 * size), (size,))
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]

    def strided(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda y, wide, weight: function(y, wide[..., size : 2 * size], weight, 1e-5)

    found, expected = outcome(strided(gated_norm), inputs), outcome(strided(pointwise.gated_norm), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 160])  # below and above what one program takes
def test_one_token_is_written_where_it_belongs(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 7, heads, 8, generator=generator).to(DEVICE)
    k, v = torch.randn(2, 2, 1, heads, 8, generator=generator).to(DEVICE)
    slot = torch.tensor([5], device=DEVICE)
    expected = keys.clone(), values.clone()
    pointwise.remember(*expected, k, v, slot)
    remember(keys, values, k, v, slot)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
