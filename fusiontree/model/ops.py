"""The one place that chooses kernels. A model asks here, once, at construction; nothing else imports a kernel."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .reference import attention, convolution, linear_cross_entropy, scan_chunked

# For each operation its back-ends, best first: `auto` takes the first that can run.
_BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "scan": {"reference": scan_chunked},
    "convolution": {"reference": convolution},
    "attention": {"reference": attention},
    "loss": {"reference": linear_cross_entropy},
}
OPS = tuple(_BACKENDS)


@dataclass(frozen=True)
class Kernels:
    """The chosen function of each operation and, for reports, the names of the choices."""

    scan: Callable[..., Any]
    convolution: Callable[..., Any]
    attention: Callable[..., Any]
    loss: Callable[..., Any]
    names: Mapping[str, str]


def available(op: str, device_type: str) -> dict[str, str | None]:
    """Back-ends of `op`, best first: None where one can run on `device_type` ("cpu", "cuda"), else why not."""
    return dict.fromkeys(_BACKENDS[op])


def select(requested: Mapping[str, str] | None = None, device_type: str = "cpu") -> Kernels:
    """Choose a back-end for every operation.

    Args:
        requested: back-end by operation; `auto` or absent takes the best that can run. The environment's
            ``FUSIONTREE_SCAN`` and its like win over it.
        device_type: where the model will run.

    Raises:
        ValueError: one asked for by name is unknown or cannot run here.
    """
    names = {op: _choose(op, (requested or {}).get(op, "auto"), device_type) for op in OPS}
    return Kernels(**{op: _BACKENDS[op][name] for op, name in names.items()}, names=names)


def _choose(op: str, requested: str, device_type: str) -> str:
    variable = f"FUSIONTREE_{op.upper()}"
    requested = os.environ.get(variable, requested)
    reasons = available(op, device_type)
    usable = [name for name, reason in reasons.items() if reason is None]
    if requested == "auto":
        return usable[0]
    if requested not in reasons:
        raise ValueError(f"kernels.{op} {requested!r} is unknown; choose auto or one of {', '.join(reasons)}")
    if requested not in usable:
        raise ValueError(f"kernels.{op} {requested!r} cannot run here: {reasons[requested]}")
    return requested
