"""A checkpoint of one layout (number of ranks, ZeRO stage) for an engine of another.

ZeRO cuts the fp32 weights and the optimizer's moments into flat pieces, and where it cuts depends on the stage and on
the number of ranks. Both the files of a checkpoint and a running engine can tell which piece holds which part of which
parameter, so a load is a copy from pieces to pieces: exact, and without a whole copy of anything, for what an engine's
own pieces do not need stays on disk.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree import layout
from fusiontree.layout import Part


class Slot(NamedTuple):
    """A part of a flattened parameter in an engine."""

    name: str
    first: int  # element of the parameter that it begins with
    length: int
    flat: Tensor  # what the optimizer steps; the slot is a stretch of it
    start: int  # element of `flat` that it begins with


def load(engine: Any, checkpoint: Path, stage: int, trust: bool) -> None:
    """Give `engine` the weights and the optimizer's state of `checkpoint`; all ranks call it together.

    Args:
        engine: DeepSpeed's, of the same model and with the same optimizer.
        checkpoint: its folder.
        stage: ZeRO stage that it was saved at.
        trust: unpickle whatever the files hold, which may run any code.
    """
    groups = _groups(engine)
    names = [engine.param_names[parameter] for group in groups for parameter in group]
    parts: dict[str, list[Part]] = {}
    for part in layout.parts(checkpoint, stage, layout.opener(values=True, trust=trust), names):
        parts.setdefault(part.name, []).append(part)
    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for number, group in enumerate(groups):
            with in_memory(engine, number):
                for slot in _slots(engine, number, group):
                    for part in parts[slot.name]:
                        _fill(slot, part, optimizer.state[slot.flat], fused)
                if engine.zero_optimization_stage() == 3:
                    engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        _spread(engine)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()


def _fill(slot: Slot, part: Part, state: dict[str, Any], fused: bool) -> None:
    """Copy to `slot` what it holds of `part`, and what the optimizer keeps once, which is the same for all parts."""
    moments = {name: value for name, value in part.kept.items() if torch.is_tensor(value) and value.dim() > 0}
    for name in part.kept.keys() - moments.keys():  # of its own: an optimizer counts in place
        value = part.kept[name]
        state[name] = value.clone().to(slot.flat.device if fused else "cpu") if torch.is_tensor(value) else value
    first, end = max(slot.first, part.first), min(slot.first + slot.length, part.first + part.length)
    if first >= end:
        return
    here = slice(slot.start + first - slot.first, slot.start + end - slot.first)
    there = slice(part.start + first - part.first, part.start + end - part.first)
    for name, moment in moments.items():
        if name not in state:
            state[name] = torch.zeros_like(slot.flat)
        state[name].view(-1)[here].copy_(moment.reshape(-1)[there])
    slot.flat.view(-1)[here].copy_(part.flat.reshape(-1)[there])


# --- what an engine holds --------------------------------------------------------------------------------------------


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


def _groups(engine: Any) -> list[list[Tensor]]:
    """The parameters by group of the optimizer, or by part of one, in order."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return zero.fp16_groups
    return zero.bit16_groups if stage > 0 else [group["params"] for group in zero.param_groups]


def _slots(engine: Any, number: int, group: list[Tensor]) -> Iterator[Slot]:
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


def _spread(engine: Any) -> None:
    """Bring the optimizer's fp32 weights to the model's parameters, as DeepSpeed does behind a step or a load."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3 and zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
