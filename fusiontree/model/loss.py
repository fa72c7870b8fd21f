"""Losses over the vocabulary, computed in chunks of tokens: the full logits are never materialized."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a token that has no loss
# (logits of one chunk, fp32 [tokens, vocabulary]; its rows) → the chunk's loss, (), and a function that returns the
# gradient of the logits and overwrites them with it
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Callable[[], Tensor]]]


class Teacher(NamedTuple):
    """A teacher's outputs for T tokens, and the settings of distillation."""

    hidden: Tensor  # [T, teacher's width], input of its head
    head: Tensor  # [vocabulary, teacher's width]
    temperature: float
    top_k: int


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients in one forward pass over chunks of tokens; only one chunk of logits exists at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows]
            loss, gradient_of = chunk_loss((part @ cast.T).float(), rows)
            total += loss
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = gradient_of().to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, cast, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ part  # a product in the dtype of hidden, accumulated over chunks in fp32
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
        )


def _linear_loss(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int) -> Tensor:
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad, so the gradients would be computed anyway
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLoss.apply(hidden, weight, chunk_loss, chunk)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of ``hidden @ weight.T`` over the labelled tokens, without materializing all logits.

    Args:
        hidden: [T, width].
        weight: [vocabulary, width].
        labels: int64 [T], `IGNORE` where there is no label.
        z_loss: weight of the squared log of the softmax's denominator (z-loss, arXiv 2204.02311), summed as well.
        chunk: tokens per chunk of logits.

    Returns:
        Cross-entropy plus z-loss in nats, and the z-loss alone, detached; fp32, shape () each.
    """
    z_sum = hidden.new_zeros((), dtype=torch.float32)

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        real = labels[rows] != IGNORE
        index = labels[rows].masked_fill(~real, 0)[:, None]
        log_sum = logits.logsumexp(-1)
        loss = ((log_sum - logits.gather(1, index)[:, 0]) * real).sum()
        if z_loss:
            squares = z_loss * (log_sum.square() * real).sum()
            z_sum.add_(squares)
            loss = loss + squares

        def gradient() -> Tensor:
            probabilities = logits.sub_(log_sum[:, None]).exp_()
            if z_loss:
                probabilities.mul_(1 + 2 * z_loss * log_sum[:, None])
            probabilities.scatter_add_(1, index, torch.full_like(index, -1, dtype=logits.dtype))
            return probabilities.mul_(real[:, None])

        return loss, gradient

    return _linear_loss(hidden, weight, chunk_loss, chunk), z_sum


def linear_distillation(hidden: Tensor, weight: Tensor, teacher: Teacher, real: Tensor, chunk: int = 1024) -> Tensor:
    """Sum the KL divergence KL(teacher ‖ model) over tokens, without materializing all logits of either.

    The outcomes are the teacher's `top_k` most likely tokens and one for all other tokens together, of which only the
    total probability is learned. Logits are divided by the temperature, and the sum is multiplied by its square to keep
    the scale of the gradients (arXiv 1503.02531).

    Args:
        hidden: [T, width].
        weight: [vocabulary, width].
        teacher: of the same T tokens and the same vocabulary.
        real: bool [T], tokens that count.
        chunk: tokens per chunk of logits.

    Returns:
        The sum in nats, fp32, shape (). The teacher gets no gradient.
    """
    temperature, top_k = teacher.temperature, min(teacher.top_k, len(weight))
    head, others = teacher.head.to(teacher.hidden.dtype), top_k < len(weight)

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        teacher_logits = (teacher.hidden[rows] @ head.T).float().div_(temperature)
        top, index = teacher_logits.topk(top_k)
        log_p = top - teacher_logits.logsumexp(-1, keepdim=True)
        p = log_p.exp()
        p_rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
        logits = logits.div_(temperature)
        log_sum = logits.logsumexp(-1, keepdim=True)
        log_q = logits.gather(1, index) - log_sum
        loss = (p * (log_p - log_q)).sum(-1)
        if others:
            rest = logits.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
            loss = loss + (torch.xlogy(p_rest, p_rest) - p_rest * (rest - log_sum))[:, 0]

        def gradient() -> Tensor:
            # q - p at the teacher's top tokens; elsewhere q minus p_rest, shared out in proportion to q
            q_top = log_q.exp() - p
            q = (logits - log_sum).exp_()
            if others:
                q -= logits.sub_(rest).exp_().mul_(p_rest)
            return q.scatter_(1, index, q_top).mul_(temperature * real[rows, None])

        return temperature**2 * (loss * real[rows]).sum(), gradient

    return _linear_loss(hidden, weight, chunk_loss, chunk)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T`` by token: nats, fp32 [T], 0 where there is no label, detached.

    Arguments as in `linear_cross_entropy`.
    """
    hidden, cast = hidden.detach(), weight.detach().to(hidden.dtype)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat(
        [F.cross_entropy((h @ cast.T).float(), y, ignore_index=IGNORE, reduction="none") for h, y in parts]
    )
