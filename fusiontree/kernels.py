"""Kernel selection with errors for users."""

from collections.abc import Mapping

import torch

from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig
from fusiontree.model.kernel_registry import Kernels, select

# dtype of the activations by `precision` of the configuration
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
_FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs with FP8 products


def check_precision(precision: str, device: torch.device) -> None:
    """Check that `device` can compute in `precision` of the configuration.

    Raises:
        UserError: it cannot.
    """
    if precision != "fp8":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        found = "this machine has no NVIDIA GPU"
    elif torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY:
        return
    else:
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    raise UserError(f"precision fp8 needs a GPU of compute capability 8.9 or later, but {found}; set precision=bf16")


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
