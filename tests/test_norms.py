"""Gradient norms of large tensors are exact to fp32 rounding on the CPU, where torch's own fp32 norm is not."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fusiontree.distributed.collectives import World
from fusiontree.training.clipping import EngineClipping, FusedClipping
from fusiontree.training.layer_watch import LayerWatch
from fusiontree.training.norms import total_norm

ELEMENTS, VALUE = 10**6, 1e-3  # torch's fp32 norm of these is off by 6e-4
NORM = VALUE * ELEMENTS**0.5


class _Model(torch.nn.Module):
    blocks = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(ELEMENTS))
        self.weight.grad = torch.full((ELEMENTS,), VALUE)


def _engine() -> SimpleNamespace:
    """Return the parts of an engine without ZeRO that hold one parameter and its gradient."""
    module = _Model()
    optimizer = SimpleNamespace(param_groups=[{"params": [module.weight]}])
    cpu = torch.device("cpu")
    return SimpleNamespace(
        module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, global_rank=0, device=cpu
    )


def _fused() -> float:
    clipping = FusedClipping(_engine(), limit=1.0)
    clipping.prepare()
    return float(clipping.result(False)[0])


def _by_engine() -> float:
    clipping = EngineClipping(_engine())
    clipping.prepare()
    return float(clipping.result(False)[0])


def _watched() -> float:
    watch = LayerWatch(_engine(), World(0, 1, torch.device("cpu")))
    watch.record_gradients()
    return float(watch._gradients[-1].sqrt())


@pytest.mark.parametrize("norm", [_fused, _by_engine, _watched])
def test_the_norm_of_a_large_gradient_is_right_on_a_cpu(norm: Callable[[], float]) -> None:
    assert norm() == pytest.approx(NORM, rel=1e-6)


def test_the_norm_covers_all_tensors_and_reports_what_is_not_finite() -> None:
    assert float(total_norm([torch.full((3,), 2.0), torch.full((2, 2), -1.0)])) == pytest.approx(4.0)
    assert float(total_norm([])) == 0.0
    assert not torch.isfinite(total_norm([torch.tensor([1.0, float("nan")]), torch.ones(2)]))
    assert total_norm([torch.full((2,), 3e38)]).isinf()
