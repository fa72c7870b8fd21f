"""The choice of kernels, worded for a user."""

from collections.abc import Mapping

import torch

from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig
from fusiontree.model.kernel_registry import Kernels, select

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of the activations, by precision


def choose_kernels(
    device_type: str,
    requested: Mapping[str, str] | None = None,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """`kernel_registry.select`, whose refusal is the user's to mend.

    Raises:
        UserError: a back-end asked for by name is unknown or cannot run here.
    """
    try:
        return select(requested, device_type, config, dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
