"""The loss head equals plain cross-entropy, and no forward or backward ever holds a matrix it must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, documents_of
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree.model.reference import IGNORE, linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_sum_and_gradients_equal_plain_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
    labels = torch.randint(30, (50,)).masked_fill(torch.rand(50) < 0.3, IGNORE)
    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight])
    ours = linear_cross_entropy(hidden, weight, labels, chunk)
    actual = torch.autograd.grad(ours * 0.3, [hidden, weight])
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(actual, expected)


def test_no_labels_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((5,), IGNORE))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_no_matrix_of_tokens_by_tokens_and_not_all_logits() -> None:
    L, V = 4096, 1024
    model = build(vocab_size=V, num_layers=1, max_positions=L)
    ids = torch.randint(V, (1, L))
    with LargestTensor() as largest:
        model(ids, documents_of([[L]]), labels=ids).loss_sum.backward()
    assert largest.numel <= 2048 * V  # one chunk of logits
    assert largest.numel < L * V  # all logits
    assert largest.numel < L * L // 4
