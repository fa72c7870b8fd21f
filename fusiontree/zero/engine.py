"""Access to DeepSpeed's optimizer state: which rank holds which part of which parameter."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fusiontree.distributed.collectives import World


class Slot(NamedTuple):
    """A part of a flattened parameter in an engine."""

    name: str
    first: int  # element of the parameter that it begins with
    length: int
    flat: Tensor  # what the optimizer steps; the slot is a stretch of it
    start: int  # element of `flat` that it begins with


def keeps_states_on_nvme(engine: Any) -> bool:
    """Whether the optimizer's states lie on NVMe between its steps; `in_memory` brings them."""
    return getattr(engine.optimizer, "swap_optimizer", False)


@contextlib.contextmanager
def in_memory(engine: Any, number: int) -> Iterator[None]:
    """While the block runs, what the optimizer holds of its group `number` is in memory, wherever it lies."""
    zero = engine.optimizer
    if not keeps_states_on_nvme(engine) or not zero._swappable_optimizer_subgroup(number):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(number)
    yield
    zero._optimizer_states_and_gradient_swap_out(number)


def optimizer_groups(engine: Any) -> list[list[Tensor]]:
    """The parameters by group of the optimizer, or by part of one, in order."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return zero.fp16_groups
    return zero.bit16_groups if stage > 0 else [group["params"] for group in zero.param_groups]


def slots(engine: Any, number: int, group: list[Tensor]) -> Iterator[Slot]:
    """What this rank's optimizer holds of the parameters of a group."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    for parameter in group:
        name = engine.param_names[parameter]
        if stage == 0:
            yield Slot(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            _, start, length = zero.grad_position[zero.get_param_id(parameter)]
            yield Slot(name, engine.global_rank * length, length, zero.fp32_partitioned_groups_flat[number], start)
        elif (place := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            here, there = place.lp_fragment_address, place.hp_fragment_address
            yield Slot(name, here.start, here.numel, zero.single_partition_of_fp32_groups[number], there.start)


def copy_to_model(engine: Any) -> None:
    """Bring the optimizer's fp32 weights to the model's parameters, as DeepSpeed does behind a step or a load."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3 and zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)


def own_gradients(engine: Any, world: World) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the mean gradient, by parameter's name: the parts of all ranks are the whole, each once."""
    from deepspeed.utils import safe_get_local_grad

    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            yield name, safe_get_local_grad(parameter)
        elif stage > 0 and parameter._hp_mapping is not None:  # else other ranks own all of it
            yield name, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        elif stage == 0 and world.is_main and parameter.grad is not None:  # none where the update is skipped
            yield name, parameter.grad
