"""Losses over the vocabulary, computed in chunks so that the full logits never exist."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a token that has no loss
# of one chunk's logits, fp32 [tokens, vocabulary]: their loss, (), and what gives their gradient, in their memory
Score = Callable[[Tensor, slice], tuple[Tensor, Callable[[], Tensor]]]


class Teacher(NamedTuple):
    """What a teacher says of T tokens, and how it is to be taken."""

    hidden: Tensor  # [T, its width], before its head
    head: Tensor  # [vocabulary, its width]
    temperature: float
    top_k: int


class _LinearLoss(torch.autograd.Function):
    """Gradients are made beside the loss, chunk by chunk, so that one chunk of logits is all that ever exists."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, score: Score, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows]
            loss, gradient_of = score((part @ cast.T).float(), rows)
            total += loss
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = gradient_of().to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, cast, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ part  # fp32 += product in the dtype of hidden
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


def _linear_loss(hidden: Tensor, weight: Tensor, score: Score, chunk: int) -> Tensor:
    if not torch.is_grad_enabled():  # else the gradients are made even so
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLoss.apply(hidden, weight, score, chunk)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T``, summed over the labelled tokens, never holding all logits.

    Args:
        hidden: [T, width]. weight: [vocabulary, width]. labels: int64 [T], `IGNORE` where there is none.
        z_loss: weight of the squared logarithm of the softmax's denominator (arXiv 2204.02311), summed likewise.
        chunk: tokens whose logits exist at a time.

    Returns:
        The sum of both in nats, and what `z_loss` is of it, without a gradient; fp32, shape () each.
    """
    z_sum = hidden.new_zeros((), dtype=torch.float32)

    def score(logits: Tensor, rows: slice) -> tuple[Tensor, Callable[[], Tensor]]:
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

    return _linear_loss(hidden, weight, score, chunk), z_sum


def linear_distillation(hidden: Tensor, weight: Tensor, teacher: Teacher, real: Tensor, chunk: int = 1024) -> Tensor:
    """Kullback-Leibler divergence of the model from a teacher, summed over tokens, never holding all logits of either.

    The teacher's `top_k` likeliest tokens stand alone, all others together are one more outcome: its probability, not
    how it is shared out, is learned. Logits are divided by the temperature and the sum multiplied by its square, which
    keeps the size of gradients (arXiv 1503.02531).

    Args:
        hidden: [T, width]. weight: [vocabulary, width]. teacher: of the same T tokens and the same vocabulary.
        real: bool [T], tokens that count. chunk: tokens whose logits exist at a time.

    Returns:
        The sum in nats, fp32, shape (). The teacher has no gradient.
    """
    heat, top_k = teacher.temperature, min(teacher.top_k, len(weight))
    head, others = teacher.head.to(teacher.hidden.dtype), top_k < len(weight)

    def score(logits: Tensor, rows: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        theirs = (teacher.hidden[rows] @ head.T).float().div_(heat)
        top, index = theirs.topk(top_k)
        log_p = top - theirs.logsumexp(-1, keepdim=True)
        p = log_p.exp()
        p_rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
        ours = logits.div_(heat)
        log_sum = ours.logsumexp(-1, keepdim=True)
        log_q = ours.gather(1, index) - log_sum
        loss = (p * (log_p - log_q)).sum(-1)
        if others:
            rest = ours.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
            loss = loss + (torch.xlogy(p_rest, p_rest) - p_rest * (rest - log_sum))[:, 0]

        def gradient() -> Tensor:
            q_top = log_q.exp() - p
            q = (ours - log_sum).exp_()
            if others:
                q -= ours.sub_(rest).exp_().mul_(p_rest)
            return q.scatter_(1, index, q_top).mul_(heat * real[rows, None])

        return heat**2 * (loss * real[rows]).sum(), gradient

    return _linear_loss(hidden, weight, score, chunk)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` by token, nats, fp32 [T], 0 where there is no label; has no gradient.

    Arguments as of `linear_cross_entropy`.
    """
    hidden, cast = hidden.detach(), weight.detach().to(hidden.dtype)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat(
        [F.cross_entropy((h @ cast.T).float(), y, ignore_index=IGNORE, reduction="none") for h, y in parts]
    )
