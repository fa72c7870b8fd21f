"""Splits of a tensor whose gradients share one buffer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.model.split import gradient_allocator, split_channels

SHAPES: list[tuple[int, ...]] = [(2, 3), (4,), (1,)]


class Doubled(torch.autograd.Function):
    """2·x, whose backward pass writes into the allocated gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.allocate_gradient = gradient_allocator(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.mul(grads[0], 2, out=ctx.allocate_gradient())


def gradients(x: Tensor, weights: list[Tensor], placed: int, twice: bool = False) -> tuple[Tensor, list[int]]:
    """Return the gradient of x and the addresses of its parts; the first `placed` parts are written in place."""
    addresses: list[int] = []
    parts = split_channels(x, SHAPES)
    total = torch.zeros(())
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        assert part.shape == (*x.shape[:-1], *SHAPES[index])
        part.register_hook(lambda grad: addresses.append(grad.data_ptr()))
        total = total + ((Doubled.apply(part) if index < placed else 2 * part) * weight).sum()
        if twice:
            total = total + (Doubled.apply(part) * weight * 3).sum()
    (grad,) = torch.autograd.grad(total, x)
    return grad, addresses


@pytest.mark.parametrize("tokens", [(2, 5), (1, 1)])
def test_gradients_are_equal_whether_written_in_place_or_copied(tokens: tuple[int, ...]) -> None:
    x = torch.randn(*tokens, 11, requires_grad=True)
    weights = [torch.randn(*tokens, *shape) for shape in SHAPES]
    expected = 2 * torch.cat([weight.flatten(2) for weight in weights], -1)
    for placed in range(4):
        grad, addresses = gradients(x, weights, placed)
        torch.testing.assert_close(grad, expected)
        offsets = {grad.data_ptr() + 4 * offset for offset in (0, 6, 10)}
        assert len(offsets & set(addresses)) == placed  # the others were copied


def test_gradients_of_a_part_used_twice_accumulate() -> None:
    x = torch.randn(2, 5, 11, requires_grad=True)
    weights = [torch.randn(2, 5, *shape) for shape in SHAPES]
    expected = 8 * torch.cat([weight.flatten(2) for weight in weights], -1)
    for placed in (0, 3):
        torch.testing.assert_close(gradients(x, weights, placed, twice=True)[0], expected)


def test_a_second_backward_pass_returns_the_same_gradient() -> None:
    x = torch.randn(3, 11, requires_grad=True)
    total = sum((Doubled.apply(part) ** 2).sum() for part in split_channels(x, SHAPES))
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, 8 * x.detach())
    torch.testing.assert_close(second, 8 * x.detach())
    assert first.data_ptr() != second.data_ptr()


def test_an_unsplit_tensor_gets_new_memory() -> None:
    gradient = gradient_allocator(torch.zeros(4, 6)[:, 1:3])()
    assert gradient.shape == (4, 2)
    assert gradient.is_contiguous()
