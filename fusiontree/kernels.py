"""The choice of kernels, worded for a user."""

from collections.abc import Mapping

from fusiontree.errors import UserError
from fusiontree.model.ops import Kernels, select


def choose_kernels(device_type: str, requested: Mapping[str, str] | None = None) -> Kernels:
    """`ops.select`, whose refusal is the user's to mend.

    Raises:
        UserError: a back-end asked for by name is unknown or cannot run here.
    """
    try:
        return select(requested, device_type)
    except ValueError as error:
        raise UserError(str(error)) from None
