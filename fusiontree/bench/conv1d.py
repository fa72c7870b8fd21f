"""A stand-in for the package `causal_conv1d`, whose build needs a CUDA compiler, over flash-linear-attention's kernel.

Peers take their fused path only where `causal_conv1d` can be imported. The stand-in gives the functions that training
on whole rows calls, with that package's signatures and layouts: B rows, D channels, L tokens, K taps.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

_FUSED_SCAN = "mamba_ssm.ops.triton.ssd_combined"  # takes the convolution's functions when it is first imported


def provide_causal_conv1d() -> str:
    """Make `causal_conv1d` importable; the name of the package whose kernel it runs.

    To be called before the modules that import it are; mamba-ssm's fused scan, which this project's own back-end may
    have imported, is told as well.

    Raises:
        ImportError: neither the package nor flash-linear-attention is usable.
    """
    try:
        importlib.import_module("causal_conv1d.cpp_functions")
        return _provider()
    except ImportError:
        pass  # most machines have no compiled one
    try:
        importlib.import_module("fla.modules.causal_conv1d")
    except Exception as error:  # compiled packages raise anything
        reason = " ".join(str(error).split())
        raise ImportError(f"neither causal_conv1d nor flash-linear-attention can be imported ({reason})") from None
    package, functions = _module("causal_conv1d", is_package=True), _module("causal_conv1d.cpp_functions")
    package.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    for name, function in _FUNCTIONS.items():
        setattr(functions, name, function)
    package.cpp_functions = functions  # type: ignore[attr-defined]
    sys.modules |= {"causal_conv1d": package, "causal_conv1d.cpp_functions": functions}
    fused = sys.modules.get(_FUSED_SCAN)
    if fused is not None:
        for name, function in {"causal_conv1d_fn": causal_conv1d_fn, **_FUNCTIONS}.items():
            setattr(fused, name, function)
    return _provider()


def _provider() -> str:
    """Whose kernel `causal_conv1d` runs now."""
    package = sys.modules["causal_conv1d"]
    ours = package.causal_conv1d_fn is causal_conv1d_fn
    return "flash-linear-attention (Triton)" if ours else f"causal_conv1d {getattr(package, '__version__', '')}".strip()


def _module(name: str, is_package: bool = False) -> types.ModuleType:
    module = types.ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    return module


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Causal depthwise convolution of x [B, D, L] with weight [D, K] and bias [D]; [B, D, L], with a gradient."""
    _whole_rows(seq_idx, initial_states, final_states_out, return_final_states or None)
    kernel = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    y, _ = kernel(x.transpose(1, 2), weight, bias, activation=activation)
    return y.transpose(1, 2)


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The same without a gradient of its own."""
    _whole_rows(seq_idx, initial_states, final_states_out)
    kernel = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d_fwd
    with torch.no_grad():
        y, _ = kernel(
            x=x.transpose(1, 2), weight=weight, bias=bias, residual=None, activation=_activation(silu_activation)
        )
    return y.transpose(1, 2)


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Gradients of x [B, D, L] (put into `dx` if given: callers go on with that memory), weight and bias."""
    _whole_rows(seq_idx, initial_states, dfinal_states, return_dinitial_states or None)
    kernel = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d_bwd
    with torch.no_grad():
        grad, d_weight, d_bias, *_ = kernel(
            x=x.transpose(1, 2),
            dy=dout.transpose(1, 2),
            dht=None,
            weight=weight,
            bias=bias,
            activation=_activation(silu_activation),
        )
    grad = grad.transpose(1, 2)
    return (grad if dx is None else dx.copy_(grad)), d_weight, d_bias, None


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None


def _whole_rows(*unused: Any) -> None:
    """Refuse what would need documents or states, rather than leave it out."""
    if any(value is not None for value in unused):
        raise NotImplementedError("the stand-in for causal_conv1d takes whole rows only: no seq_idx, no states")


_FUNCTIONS: dict[str, Any] = {
    "causal_conv1d_fwd_function": causal_conv1d_fwd_function,
    "causal_conv1d_bwd_function": causal_conv1d_bwd_function,
    "causal_conv1d_update_function": None,  # imported beside the others; only decoding calls it
}
