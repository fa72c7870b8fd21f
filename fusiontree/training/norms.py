"""Norms of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm over all elements of all `gradients`, fp32 ().

    On the CPU torch sums the squares of a tensor one after the other, so the fp32 norm of 10^7 elements is 4e-4 too low
    (findings/torch-cpu-vector-norm.sh). There the squares are summed in fp64.
    """
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(list(gradients))
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).float()
