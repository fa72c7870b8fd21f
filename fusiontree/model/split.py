"""A split of a tensor's last axis whose backward pass needs no concatenation.

torch's own split concatenates the gradients of the parts: one more read and write of all of them. Here the kernels
write each gradient into its slice of a shared buffer.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class _GradientBuffer:
    """Memory for the gradients of all parts, allocated for the first part and released by `collect`."""

    def __init__(self, x: Tensor, shapes: Sequence[tuple[int, ...]]):
        self.new = partial(torch.empty, dtype=x.dtype, device=x.device)
        self.shape, self.shapes, self.sizes = x.shape, shapes, [math.prod(shape) for shape in shapes]
        self.buffer: Tensor | None = None
        self.reserved: set[int] = set()

    def allocate(self, index: int) -> Tensor:
        """Return the part's slice of the buffer the first time; later calls allocate, because gradients accumulate."""
        if index in self.reserved:
            return self.new((*self.shape[:-1], *self.shapes[index]))
        self.reserved.add(index)
        return self._memory().split(self.sizes, -1)[index].unflatten(-1, self.shapes[index])

    def collect(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the unsplit tensor; copy those of `grads` that are not in the buffer yet."""
        buffer = self._memory()
        for grad, part in zip(grads, buffer.split(self.sizes, -1), strict=True):
            if not grad.squeeze().is_set_to(part.squeeze()):  # squeeze: axes of size 1 may have any stride
                part.copy_(grad)
        self.buffer, self.reserved = None, set()
        return buffer

    def _memory(self) -> Tensor:
        if self.buffer is None:
            self.buffer = self.new(self.shape)
        return self.buffer


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: _GradientBuffer) -> tuple[Tensor, ...]:
        ctx.buffer = buffer
        return x.split(buffer.sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.buffer.collect(grads), None


def split_channels(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of x [..., channels], one [..., *shape] per shape; their gradients share one buffer."""
    buffer = _GradientBuffer(x, shapes)
    parts = [part.unflatten(-1, shape) for part, shape in zip(_Split.apply(x, buffer), shapes, strict=True)]
    for index, part in enumerate(parts):
        part.allocate_gradient = partial(buffer.allocate, index)
    return parts


def gradient_allocator(x: Tensor) -> Callable[[], Tensor]:
    """Return a function that allocates x's gradient: the slice of a shared buffer if x is a part, else new memory."""
    return getattr(x, "allocate_gradient", None) or partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
