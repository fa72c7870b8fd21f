"""The kernel registry: the back-ends of each operation, and the choice between them.

A model asks `select` for its kernels. The reference kernels need nothing but torch. All other kernels are imported by
the loaders in `backends.py`, and only when they are chosen or when their availability is checked.

To add a kernel, write its loader in `backends.py` and one `Backend` entry in `Kernels`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch

from . import reference
from .backends import (
    attention_flash2,
    attention_flash4,
    attention_flex,
    convolution_triton,
    decode_triton,
    loss_liger,
    pointwise_compile,
    prefill_flash2,
    prefill_flash4,
    scan_mamba_ssm,
)
from .config import ModelConfig
from .loss import linear_cross_entropy
from .pointwise import Pointwise

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation, and its requirements."""

    load: Callable[[], Any]  # imports and returns the function; raises if that is impossible
    package: str = ""  # pip requirement, which implies a CUDA device; empty: torch is enough
    interpreted: bool = False  # one of our Triton kernels, which also run on a CPU in Triton's interpreter
    dtypes: tuple[torch.dtype, ...] = ()  # supported dtypes of the activations; empty: all
    limits: Callable[[ModelConfig], str | None] = lambda config: None  # returns why a model's shape is not supported


def _scan_limits(config: ModelConfig) -> str | None:
    if not 16 <= config.chunk_size <= 512 or config.chunk_size & (config.chunk_size - 1):
        return f"chunk_size {config.chunk_size} is not a power of two from 16 to 512"
    for name in ("ssm_head_dim", "ssm_state_size"):
        if not 8 <= getattr(config, name) <= 256 or getattr(config, name) % 8:
            return f"{name} {getattr(config, name)} is not a multiple of 8 from 8 to 256"
    return None


def _conv_limits(config: ModelConfig) -> str | None:
    return f"conv_kernel {config.conv_kernel} is above 4" if config.conv_kernel > 4 else None


def _head_limits(
    largest: int, step: int = 8, power: bool = False, also: int | None = None
) -> Callable[[ModelConfig], str | None]:
    """Return limits to the multiples of `step` (or the powers of two) up to `largest`, and to the size `also`."""

    def limits(config: ModelConfig) -> str | None:
        D = config.head_dim
        if also == D:
            return None
        if power and (D < 16 or D & (D - 1) or largest < D):
            return f"head_dim {D} is not a power of two from 16 to {largest}"
        alternative = "" if also is None else f", nor {also}"
        return (
            f"head_dim {D} is not a multiple of {step} up to {largest}{alternative}"
            if D % step or largest < D
            else None
        )

    return limits


@dataclass(frozen=True)
class Kernels:
    """The function chosen for each operation, with the signature and results of its reference.

    Each field but `names` is an operation. Its metadata are the back-ends, fastest first as measured in
    docs/performance.md: `auto` takes the first that can run.
    """

    scan: Callable[..., Any] = field(
        metadata={
            "mamba_ssm": Backend(scan_mamba_ssm, "mamba-ssm>=2.3.2,<2.4", limits=_scan_limits),
            "reference": Backend(lambda: reference.scan_chunked),
        }
    )
    convolution: Callable[..., Any] = field(
        metadata={
            "triton": Backend(convolution_triton, "triton", interpreted=True, limits=_conv_limits),
            "reference": Backend(lambda: reference.convolution),
        }
    )
    attention: Callable[..., Any] = field(
        metadata={
            # sizes measured to be correct; at others flash-attn-4 4.0.0b36 can return wrong gradients without an error
            "flash4": Backend(attention_flash4, "flash-attn-4", dtypes=_HALF, limits=_head_limits(128, 32, also=256)),
            "flash2": Backend(attention_flash2, "flash-attn>=2.8,<3", dtypes=_HALF, limits=_head_limits(256)),
            "flex": Backend(attention_flex, "triton", limits=_head_limits(256, power=True)),
            "reference": Backend(lambda: reference.attention),
        }
    )
    prefill: Callable[..., Any] = field(
        metadata={
            "flash4": Backend(prefill_flash4, "flash-attn-4", dtypes=_HALF, limits=_head_limits(128)),
            "flash2": Backend(prefill_flash2, "flash-attn>=2.8,<3", dtypes=_HALF, limits=_head_limits(256)),
            "reference": Backend(lambda: reference.attention_continued),
        }
    )
    decode: Callable[..., Any] = field(
        metadata={
            "triton": Backend(decode_triton, "triton", interpreted=True, limits=_head_limits(256, power=True)),
            "reference": Backend(lambda: reference.decode_attention),
        }
    )
    loss: Callable[..., Any] = field(
        metadata={
            "liger": Backend(loss_liger, "liger-kernel>=0.8,<0.9"),
            "reference": Backend(lambda: linear_cross_entropy),
        }
    )
    pointwise: Pointwise = field(
        metadata={
            "compile": Backend(pointwise_compile, "triton"),
            "reference": Backend(Pointwise),
        }
    )
    names: Mapping[str, str]  # the chosen back-end by operation, for reports


BACKENDS: dict[str, Mapping[str, Backend]] = {f.name: f.metadata for f in fields(Kernels) if f.metadata}
OPERATIONS = tuple(BACKENDS)  # the keys of the configuration's `kernels` section


def available(
    op: str, device_type: str, config: ModelConfig | None = None, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Check every back-end of an operation.

    Args:
        op: one of `OPERATIONS`.
        device_type: "cpu" or "cuda".
        config: the model's shape; None skips the check of the shape.
        dtype: of the activations; None skips the check of the dtype.

    Returns:
        By back-end, fastest first: None if it can run, else the reason why it cannot.
    """
    return {name: _obstacle(op, name, device_type, config, dtype) for name in BACKENDS[op]}


def _obstacle(
    op: str, name: str, device_type: str, config: ModelConfig | None, dtype: torch.dtype | None
) -> str | None:
    backend = BACKENDS[op][name]
    interpreting = backend.interpreted and os.environ.get("TRITON_INTERPRET") == "1"
    if backend.package and device_type != "cuda" and not interpreting:
        return "needs a CUDA device"
    if dtype is not None and backend.dtypes and dtype not in backend.dtypes:
        return f"supports {' or '.join(str(d).removeprefix('torch.') for d in backend.dtypes)}, not {str(dtype)[6:]}"
    limit = None if config is None else backend.limits(config)
    return limit or _import_error(op, name)


@lru_cache
def _import_error(op: str, name: str) -> str | None:
    """Return why a back-end cannot be imported, with the package to install; None if it can."""
    backend = BACKENDS[op][name]
    try:
        backend.load()
    except Exception as error:  # compiled packages raise anything: RuntimeError for a missing library, OSError, ...
        reason = " ".join(str(error).split())
        return f"{type(error).__name__}: {reason}; pip install --no-build-isolation '{backend.package}'"
    return None


def select(
    requested: Mapping[str, str] | None = None,
    device_type: str = "cpu",
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """Choose and load a back-end for every operation.

    Args:
        requested: back-end by operation; `auto`, or a missing key, takes the fastest that can run. The environment
            variable of an operation, such as ``FUSIONTREE_SCAN``, has precedence.
        device_type: "cpu" or "cuda".
        config: the model's shape, as in `available`.
        dtype: of the activations, as in `available`.

    Raises:
        ValueError: a requested back-end is unknown or cannot run here.
    """
    return _load({op: choose(op, (requested or {}).get(op, "auto"), device_type, config, dtype) for op in OPERATIONS})


def reference_kernels() -> Kernels:
    """Return the reference of every operation, which runs on any device. The environment has no effect."""
    return _load(dict.fromkeys(OPERATIONS, "reference"))


def _load(names: Mapping[str, str]) -> Kernels:
    return Kernels(**{op: BACKENDS[op][name].load() for op, name in names.items()}, names=names)


def choose(
    op: str,
    requested: str,
    device_type: str,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Return the name of the back-end that `select` takes for one operation; arguments and errors as there."""
    requested = os.environ.get(f"FUSIONTREE_{op.upper()}", requested)
    reasons = available(op, device_type, config, dtype)
    if requested == "auto" and device_type != "cuda":  # skips interpreted kernels: the interpreter is for tests
        return next(name for name in reasons if not BACKENDS[op][name].package)
    if requested == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if requested not in reasons:
        raise ValueError(f"kernels.{op} {requested!r} is unknown; choose auto or one of {', '.join(reasons)}")
    if reasons[requested] is not None:
        raise ValueError(f"kernels.{op} {requested!r} cannot run here: {reasons[requested]}")
    return requested
