"""Access to a live DeepSpeed engine: partitions of weights and optimizer states, gradient shards, skipped updates.

How ZeRO cuts parameters, with three ranks and a group of parameters p0, p1 and p2:

Stages 1 and 2 concatenate the flattened parameters of a group, pad the result, and cut it into one equal partition per
rank. A cut may fall inside a parameter, and a rank may have no part of one::

    parameters   |      p0      |  p1  |         p2        |pad|
    partitions   |     rank 0     |     rank 1     |   rank 2  |

Stage 3 cuts each parameter into one equal partition per rank and pads the last. A rank concatenates its partitions::

    p0           | rank 0 | rank 1 |rank 2 pad|
    p1           | rank 0 | rank 1 |rank 2 pad|
    rank 1       | p0, part 1 | p1, part 1 | p2, part 1 |

The optimizer steps these flat fp32 tensors, one per group and rank, and keeps its moments in the same shape. At stage 3
DeepSpeed splits large groups into sub-groups with a flat tensor each. Without ZeRO it steps the parameters themselves.
A `Slot` is the overlap of one parameter with one flat tensor of this rank.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fusiontree.zero.setup import full_shape


class Slot(NamedTuple):
    """The part of one flattened parameter that is in one flat tensor of this rank's optimizer."""

    name: str  # of the parameter
    first: int  # index of the part's first element in the parameter
    length: int  # elements, without padding
    flat: Tensor  # fp32, as the optimizer steps it
    start: int  # index of the part's first element in `flat`


# --- optimizer -------------------------------------------------------------------------------------------------------


def base_optimizer(engine: Any) -> Any:
    """Return the torch optimizer that ZeRO wraps; without ZeRO, the engine's optimizer itself."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def overflowed(engine: Any) -> bool:
    """Return whether ZeRO skipped the last step because a gradient was not finite."""
    return engine.optimizer.overflow


def skip_step(engine: Any) -> None:
    """Drop the accumulated gradient in place of the last `engine.step()` of an update."""
    engine.zero_grad()
    engine.micro_steps += 1  # the engine derives the boundaries of gradient accumulation from it


# --- partitions ------------------------------------------------------------------------------------------------------


def optimizer_groups(engine: Any) -> list[list[Tensor]]:
    """Return the parameters by optimizer group, at stage 3 by sub-group, in the optimizer's order."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return zero.fp16_groups
    return zero.bit16_groups if stage > 0 else [group["params"] for group in zero.param_groups]


def parameter_name(engine: Any, parameter: Tensor) -> str:
    """Return the name of `parameter` in the model."""
    return engine.param_names[parameter]


def slots(engine: Any, number: int, group: list[Tensor]) -> Iterator[Slot]:
    """Yield the slots of this rank for the parameters `group`, which is `optimizer_groups(engine)[number]`."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    for parameter in group:
        name = parameter_name(engine, parameter)
        if stage == 0:
            yield Slot(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            # `share` is the same on every rank: ceil(numel / ranks), padding included
            _, start, share = zero.grad_position[zero.get_param_id(parameter)]
            first = engine.global_rank * share
            length = min(share, max(0, math.prod(full_shape(parameter)) - first))
            yield Slot(name, first, length, zero.fp32_partitioned_groups_flat[number], start)
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            # "lp" is the model's parameter, "hp" the fp32 partition; None where they do not overlap on this rank
            lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Slot(name, lp.start, lp.numel, zero.single_partition_of_fp32_groups[number], hp.start)


@contextlib.contextmanager
def partitioned(engine: Any) -> Iterator[None]:
    """Partition all parameters of ZeRO stage 3 while the block runs, then gather the persistent ones again."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()


def copy_group_to_model(engine: Any, number: int) -> None:
    """Copy the fp32 weights of sub-group `number` of stage 3 to the model's partitions; other stages: do nothing."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)


def copy_to_model(engine: Any) -> None:
    """Copy the fp32 partitions of stages 1 and 2 to the model's parameters; other stages: do nothing."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()


# --- states on NVMe --------------------------------------------------------------------------------------------------


def keeps_states_on_nvme(engine: Any) -> bool:
    """Return whether optimizer states are on NVMe between steps; `in_memory` loads them."""
    return engine.zero_optimization_stage() == 3 and engine.optimizer.swap_optimizer


@contextlib.contextmanager
def in_memory(engine: Any, number: int) -> Iterator[None]:
    """Keep the optimizer states of group `number` in memory while the block runs; write them back to NVMe after it."""
    # DeepSpeed keeps small sub-groups in memory even where it offloads to NVMe
    if not keeps_states_on_nvme(engine) or not engine.optimizer._swappable_optimizer_subgroup(number):
        yield
        return
    engine.optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    engine.optimizer._optimizer_states_and_gradient_swap_out(number)


def flat_states(engine: Any) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield number, flat fp32 weights and optimizer states of each sub-group of stage 3, in memory while yielded."""
    for number, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        with in_memory(engine, number):
            yield number, flat, base_optimizer(engine).state[flat]


# --- gradients -------------------------------------------------------------------------------------------------------


def gradient_shards(engine: Any) -> Iterator[Tensor]:
    """Yield this rank's shards of the mean gradient, at any stage without offloading; without ZeRO, all of it.

    Valid from the last backward pass of an update to its step.
    """
    if engine.zero_optimization_stage() > 0:
        for shards in engine.optimizer.averaged_gradients.values():
            yield from shards
        return
    for group in engine.optimizer.param_groups:
        yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)


def named_gradient_shards(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield parameter names and this rank's shards of the mean gradient, at any stage.

    The shards of all ranks contain each element of the gradient exactly once. Without ZeRO every rank has the full
    gradient, so only rank 0 yields it.
    """
    from deepspeed.utils import safe_get_local_grad

    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            yield name, safe_get_local_grad(parameter)
        elif stage > 0 and parameter._hp_mapping is not None:
            yield name, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        elif stage == 0 and engine.global_rank == 0 and parameter.grad is not None:  # None if the update is skipped
            yield name, parameter.grad
