"""The one place that chooses kernels. A model asks here, once, at construction; nothing else imports a kernel."""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from . import reference
from .config import ModelConfig
from .loss import linear_cross_entropy
from .pointwise import Pointwise

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One way to run an operation: how to load it and what it needs."""

    load: Callable[[], Any]  # imports it; raises where it cannot run
    install: str = ""  # the package that brings it; empty: it needs nothing but torch
    interpreted: bool = False  # a Triton kernel of ours, which Triton's interpreter runs on a CPU
    dtypes: tuple[torch.dtype, ...] = ()  # of the activations; empty: any
    limits: Callable[[ModelConfig], str | None] = lambda config: None  # why it cannot take a shape


@dataclass(frozen=True)
class Kernels:
    """The chosen function of each operation and, for reports, the names of the choices."""

    scan: Callable[..., Any]
    convolution: Callable[..., Any]
    attention: Callable[..., Any]
    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    loss: Callable[..., Any]
    pointwise: Pointwise
    names: Mapping[str, str]


def _of_backends(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from .backends import load_backend

        return load_backend(name)

    return load


def _triton_convolution() -> Callable[..., Any]:
    from .triton_kernels import convolution

    return convolution


def _triton_decode() -> Callable[..., Any]:
    from .triton_attention import decode_attention

    return decode_attention


def _compiled() -> Pointwise:
    importlib.import_module("triton")  # what the compiler writes in for a GPU
    # prompts of many lengths and models of many shapes may meet in one process; past the limit it would raise
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled = Pointwise(*(torch.compile(function, fullgraph=True) for function in Pointwise()))
    from .triton_attention import attention_inputs, joined_norm, remember
    from .triton_kernels import gated_norm, swiglu

    own = (attention_inputs, gated_norm, joined_norm, remember, swiglu)
    return compiled._replace(**{function.__name__: function for function in own})


def _scan_limits(config: ModelConfig) -> str | None:
    if not 16 <= config.chunk_size <= 512 or config.chunk_size & (config.chunk_size - 1):
        return f"chunk_size {config.chunk_size} is not a power of two from 16 to 512"
    for field in ("ssm_head_dim", "ssm_state_size"):
        if not 8 <= getattr(config, field) <= 256 or getattr(config, field) % 8:
            return f"{field} {getattr(config, field)} is not a multiple of 8 from 8 to 256"
    return None


def _conv_limits(config: ModelConfig) -> str | None:
    return f"conv_kernel {config.conv_kernel} is above 4" if config.conv_kernel > 4 else None


def _head_limits(largest: int, step: int = 8, power: bool = False) -> Callable[[ModelConfig], str | None]:
    def limits(config: ModelConfig) -> str | None:
        D = config.head_dim
        if power and (D < 16 or D & (D - 1) or largest < D):
            return f"head_dim {D} is not a power of two from 16 to {largest}"
        return f"head_dim {D} is not a multiple of {step} up to {largest}" if D % step or largest < D else None

    return limits


# For each operation its back-ends, best first as measured (docs/performance.md): `auto` takes the first that can run.
_BACKENDS: dict[str, dict[str, Backend]] = {
    "scan": {
        "mamba_ssm": Backend(_of_backends("scan_mamba_ssm"), "mamba-ssm>=2.3.2", limits=_scan_limits),
        "reference": Backend(lambda: reference.scan_chunked),
    },
    "convolution": {
        "triton": Backend(_triton_convolution, "triton", interpreted=True, limits=_conv_limits),
        "reference": Backend(lambda: reference.convolution),
    },
    "attention": {
        # at head sizes between, 4.0.0b36 gives wrong gradients without a word
        "flash4": Backend(_of_backends("attention_flash4"), "flash-attn-4", dtypes=_HALF, limits=_head_limits(128, 32)),
        "flash2": Backend(_of_backends("attention_flash2"), "flash-attn>=2.8", dtypes=_HALF, limits=_head_limits(256)),
        "flex": Backend(_of_backends("attention_flex"), "triton", limits=_head_limits(256, power=True)),
        "reference": Backend(lambda: reference.attention),
    },
    "prefill": {
        "flash4": Backend(_of_backends("prefill_flash4"), "flash-attn-4", dtypes=_HALF, limits=_head_limits(128)),
        "flash2": Backend(_of_backends("prefill_flash2"), "flash-attn>=2.8", dtypes=_HALF, limits=_head_limits(256)),
        "reference": Backend(lambda: reference.attention_continued),
    },
    "decode": {
        "triton": Backend(_triton_decode, "triton", interpreted=True, limits=_head_limits(256, power=True)),
        "reference": Backend(lambda: reference.decode_attention),
    },
    "loss": {
        "liger": Backend(_of_backends("loss_liger"), "liger-kernel"),
        "reference": Backend(lambda: linear_cross_entropy),
    },
    "pointwise": {
        "compile": Backend(_compiled, "triton"),
        "reference": Backend(Pointwise),
    },
}
OPS = tuple(_BACKENDS)


def available(
    op: str, device_type: str, config: ModelConfig | None = None, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Back-ends of `op`, best first: None where one can run, else why not.

    Args:
        device_type: "cpu" or "cuda". config: the model's shape, where it is known. dtype: of its activations, likewise.
    """
    return {name: _obstacle(op, name, device_type, config, dtype) for name in _BACKENDS[op]}


def _obstacle(
    op: str, name: str, device_type: str, config: ModelConfig | None, dtype: torch.dtype | None
) -> str | None:
    backend = _BACKENDS[op][name]
    interpreting = backend.interpreted and os.environ.get("TRITON_INTERPRET") == "1"
    if backend.install and device_type != "cuda" and not interpreting:
        return "needs a CUDA device"
    if dtype is not None and backend.dtypes and dtype not in backend.dtypes:
        return f"takes {' or '.join(str(d).removeprefix('torch.') for d in backend.dtypes)}, not {str(dtype)[6:]}"
    limit = None if config is None else backend.limits(config)
    return limit or _import_failure(op, name)


@lru_cache
def _import_failure(op: str, name: str) -> str | None:
    """Why a back-end cannot be imported, with the package to install; None if it can."""
    backend = _BACKENDS[op][name]
    try:
        backend.load()
    except Exception as error:  # compiled packages raise anything: RuntimeError for a missing library, OSError, ...
        reason = " ".join(str(error).split())
        return f"{type(error).__name__}: {reason}; pip install '{backend.install}'"
    return None


def select(
    requested: Mapping[str, str] | None = None,
    device_type: str = "cpu",
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """Choose a back-end for every operation.

    Args:
        requested: back-end by operation; `auto` or absent takes the best that can run. The environment's
            ``FUSIONTREE_SCAN`` and its like win over it.
        device_type, config, dtype: where the model will run, its shape and its activations, as in `available`.

    Raises:
        ValueError: one asked for by name is unknown or cannot run here.
    """
    return _load({op: choose(op, (requested or {}).get(op, "auto"), device_type, config, dtype) for op in OPS})


def reference_kernels() -> Kernels:
    """The reference of every operation, on any device, whatever the environment says."""
    return _load(dict.fromkeys(OPS, "reference"))


def _load(names: Mapping[str, str]) -> Kernels:
    return Kernels(**{op: _BACKENDS[op][name].load() for op, name in names.items()}, names=names)


def choose(
    op: str,
    requested: str,
    device_type: str,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The name of the back-end of `op` that `select` takes; arguments and errors as there."""
    requested = os.environ.get(f"FUSIONTREE_{op.upper()}", requested)
    reasons = available(op, device_type, config, dtype)
    if requested == "auto" and device_type != "cuda":  # the interpreter is for tests: only by name
        return next(name for name in reasons if not _BACKENDS[op][name].install)
    if requested == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if requested not in reasons:
        raise ValueError(f"kernels.{op} {requested!r} is unknown; choose auto or one of {', '.join(reasons)}")
    if reasons[requested] is not None:
        raise ValueError(f"kernels.{op} {requested!r} cannot run here: {reasons[requested]}")
    return requested
