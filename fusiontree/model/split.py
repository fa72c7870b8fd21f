"""Cutting the last axis of a tensor into parts whose gradients are written side by side, not copied together."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class _Joint:
    """Memory for the gradients of all parts, there from the first one's writing until it is taken."""

    def __init__(self, x: Tensor, shapes: Sequence[tuple[int, ...]]):
        self.new = partial(torch.empty, dtype=x.dtype, device=x.device)
        self.shape, self.shapes, self.sizes = x.shape, shapes, [math.prod(shape) for shape in shapes]
        self.whole: Tensor | None = None
        self.given: set[int] = set()

    def place(self, index: int) -> Tensor:
        """Memory of the shape of a part for its gradient: its place, but that only once, for gradients may add up."""
        if index in self.given:
            return self.new((*self.shape[:-1], *self.shapes[index]))
        self.given.add(index)
        return self._memory().split(self.sizes, -1)[index].unflatten(-1, self.shapes[index])

    def take(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient of the whole; those of `grads` that were not written to their places are copied there."""
        whole = self._memory()
        for grad, part in zip(grads, whole.split(self.sizes, -1), strict=True):
            if not grad.squeeze().is_set_to(part.squeeze()):  # the stride of a single token may be any
                part.copy_(grad)
        self.whole, self.given = None, set()
        return whole

    def _memory(self) -> Tensor:
        if self.whole is None:
            self.whole = self.new(self.shape)
        return self.whole


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: _Joint) -> tuple[Tensor, ...]:
        ctx.joint = joint
        return x.split(joint.sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.joint.take(grads), None


def split_channels(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of x [..., channels], one [..., *shape] for each shape; the places of their gradients lie side by side."""
    joint = _Joint(x, shapes)
    parts = [part.unflatten(-1, shape) for part, shape in zip(_Split.apply(x, joint), shapes, strict=True)]
    for index, part in enumerate(parts):
        part.gradient_place = partial(joint.place, index)
    return parts


def gradient_place(x: Tensor) -> Callable[[], Tensor]:
    """What gives memory for the gradient of x to whoever computes it, in x's shape; new memory unless x is a part."""
    return getattr(x, "gradient_place", None) or partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
