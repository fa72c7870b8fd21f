"""The loss head equals plain cross-entropy, and no pass materializes all logits or a matrix of tokens by tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, documents_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree.model.loss import IGNORE, Teacher, linear_cross_entropy, linear_distillation, token_losses


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 60),
    size=st.integers(1, 12),
    vocab=st.integers(2, 40),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    chunk=st.integers(1, 64),
)
def test_sum_and_gradients_equal_plain_cross_entropy(
    seed: int, tokens: int, size: int, vocab: int, ignored: float, chunk: int
) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.randn(vocab, size, requires_grad=True)
    labels = torch.randint(vocab, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORE)
    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight])
    ours, _ = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    actual = torch.autograd.grad(ours * 0.3, [hidden, weight])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64])
def test_token_losses_equal_plain_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 12), torch.randn(30, 12, requires_grad=True)
    labels = torch.randint(30, (50,)).masked_fill(torch.rand(50) < 0.3, IGNORE)
    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="none")
    ours = token_losses(hidden, weight, labels, chunk)
    torch.testing.assert_close(ours, plain.detach())
    assert not ours.requires_grad
    assert (ours[labels == IGNORE] == 0).all()


def test_no_labels_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.full((5,), IGNORE))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_z_loss_adds_the_squared_log_partition_and_returns_it() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
    labels = torch.randint(30, (50,)).masked_fill(torch.rand(50) < 0.3, IGNORE)
    logits = hidden @ weight.T
    z = 0.1 * logits.logsumexp(-1)[labels != IGNORE].square().sum()
    plain = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain + z, [hidden, weight])
    ours, part = linear_cross_entropy(hidden, weight, labels, z_loss=0.1, chunk=7)
    torch.testing.assert_close(ours, plain + z)
    torch.testing.assert_close(part, z.detach())
    assert not part.requires_grad
    torch.testing.assert_close(torch.autograd.grad(ours, [hidden, weight]), expected)


@pytest.mark.parametrize("top_k", [1, 5, 30, 99])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_the_divergence_over_the_top_and_the_rest(top_k: int, temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
    teacher = Teacher(torch.randn(50, 7), torch.randn(30, 7), temperature, top_k)
    real = torch.rand(50) < 0.7
    p = (teacher.hidden @ teacher.head.T / temperature).softmax(-1)
    q = (hidden @ weight.T / temperature).softmax(-1)
    top = p.topk(min(top_k, 30)).indices
    p, q = ([x.gather(1, top), 1 - x.gather(1, top).sum(-1, keepdim=True)] for x in (p, q))
    terms = (p[0] * (p[0] / q[0]).log()).sum(-1)
    if top_k < 30:
        terms = terms + (p[1] * (p[1] / q[1]).log())[:, 0]
    plain = temperature**2 * terms[real].sum()
    ours = linear_distillation(hidden, weight, teacher, real, chunk=7)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight])
    torch.testing.assert_close(torch.autograd.grad(ours * 0.3, [hidden, weight]), expected, rtol=1e-4, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss_and_a_distant_one_is_finite() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 12), torch.randn(30, 12)
    every = torch.ones(20, dtype=torch.bool)
    for scale in (1.0, 300.0):
        student = (hidden * scale).requires_grad_()
        loss = linear_distillation(student, weight, Teacher(hidden, weight, 1.0, 4), every)
        (gradient,) = torch.autograd.grad(loss, [student])
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert (loss.abs() < 1e-4) == (scale == 1.0)


class LargestTensor(TorchDispatchMode):
    """A dispatch mode that records the largest number of elements in any operation's result."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.slow
def test_neither_all_logits_nor_tokens_by_tokens_are_materialized() -> None:
    L, V = 4096, 1024
    model = build(vocab_size=V, num_layers=1, max_positions=L)
    ids = torch.randint(V, (1, L))
    with LargestTensor() as largest:
        teacher = Teacher(torch.randn(L, 8), torch.randn(V, 8), 1.0, 4)
        output = model(ids, documents_of([[L]]), labels=ids, z_loss=0.1, teacher=teacher)
        (output.loss_sum + output.distill_sum).backward()
    assert largest.numel <= 2048 * V  # one chunk of logits
    assert largest.numel < L * V  # all logits
    assert largest.numel < L * L // 4


@torch.no_grad()
def test_token_losses_sum_to_the_loss_with_one_chunk_of_logits() -> None:
    L, V = 4096, 1024
    model = build(vocab_size=V, num_layers=1, max_positions=L)
    ids, documents = torch.randint(V, (1, L)), documents_of([[1000, L - 1000]])
    labels = ids.masked_fill(torch.rand(1, L) < 0.3, IGNORE)
    with LargestTensor() as largest:
        losses = model(ids, documents, labels=labels, by_token=True).token_losses
    torch.testing.assert_close(losses.sum(), model(ids, documents, labels=labels).loss_sum)
    assert losses.shape == labels.shape
    assert largest.numel <= 1024 * V
