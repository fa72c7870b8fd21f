"""Kernel selection with errors for users."""

from collections.abc import Mapping

import torch

from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig
from fusiontree.model.kernel_registry import Kernels, select

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of the activations, by `precision` of the configuration


def choose_kernels(
    device_type: str,
    requested: Mapping[str, str] | None = None,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """Select kernels as `kernel_registry.select` does.

    Raises:
        UserError: a requested back-end is unknown or cannot run here.
    """
    try:
        return select(requested, device_type, config, dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
