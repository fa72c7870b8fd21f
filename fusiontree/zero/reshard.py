"""The loader of checkpoints, into an engine with any number of ranks and any ZeRO stage.

DeepSpeed's own is not used: its universal checkpoints do not cross stage 3 and lose group options, and its
`load_checkpoint` takes the checkpoint's path for a glob pattern and unpickles any object.

ZeRO partitions the fp32 weights and the optimizer's moments, and the stage and the number of ranks decide on the cuts.
`layout.parts` lists which file has which part of which parameter, `engine.slots` which flat tensor of this rank needs
it. A load copies the overlaps of both, so it is exact, and parts that this rank does not need stay on disk. With the
same stage and the same number of ranks, a rank reads only its own file.
"""

from pathlib import Path
from typing import Any

import torch

from fusiontree.errors import RunError
from fusiontree.zero import layout
from fusiontree.zero.engine import (
    Slot,
    base_optimizer,
    copy_group_to_model,
    copy_to_model,
    in_memory,
    optimizer_groups,
    parameter_name,
    partitioned,
    slots,
)
from fusiontree.zero.layout import Part


def load(engine: Any, checkpoint: Path, stage: int, own: int | None, trust: bool) -> None:
    """Load weights and optimizer states of `checkpoint` into `engine`; a collective call.

    Args:
        engine: a DeepSpeed engine with the same model and the same optimizer.
        checkpoint: its folder.
        stage: ZeRO stage that it was saved at.
        own: this rank, if the checkpoint has the engine's stage and number of ranks: only its own file is read then.
        trust: unpickle arbitrary objects in the files, which can run any code.

    Raises:
        RunError: the checkpoint does not have every element of the engine's parameters.
    """
    groups = optimizer_groups(engine)
    names = [parameter_name(engine, parameter) for group in groups for parameter in group]
    read = layout.reader(values=True, trust=trust)
    parts: dict[str, list[Part]] = {}
    for part in layout.parts(checkpoint, stage, read, names, own):
        parts.setdefault(part.name, []).append(part)
    optimizer = base_optimizer(engine)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    with partitioned(engine), torch.no_grad():
        for number, group in enumerate(groups):
            with in_memory(engine, number):
                for slot in slots(engine, number, group):
                    found = parts.get(slot.name, [])
                    if own is not None:
                        found = [part._replace(first=slot.first + part.first) for part in found]
                    filled = sum(_fill(slot, part, optimizer.state[slot.flat], fused) for part in found)
                    if filled < slot.length:
                        raise RunError(
                            f"{checkpoint} has {filled} of {slot.length} elements of {slot.name} that this rank "
                            "needs; use another checkpoint"
                        )
                copy_group_to_model(engine, number)
        copy_to_model(engine)


def _fill(slot: Slot, part: Part, state: dict[str, Any], fused: bool) -> int:
    """Copy the overlap of `part` and `slot`, weights and moments, and the optimizer's scalars such as its step.

    Returns:
        The number of elements copied.
    """
    moments = {name: value for name, value in part.states.items() if torch.is_tensor(value) and value.dim() > 0}
    for name in part.states.keys() - moments.keys():  # scalars; cloned, because the optimizer counts steps in place
        value = part.states[name]
        state[name] = value.clone().to(slot.flat.device if fused else "cpu") if torch.is_tensor(value) else value
    first, end = max(slot.first, part.first), min(slot.first + slot.length, part.first + part.length)
    if first >= end:
        return 0
    here = slice(slot.start + first - slot.first, slot.start + end - slot.first)
    there = slice(part.start + first - part.first, part.start + end - part.first)
    for name, moment in moments.items():
        if name not in state:
            state[name] = torch.zeros_like(slot.flat)
        state[name].view(-1)[here].copy_(moment.reshape(-1)[there])
    slot.flat.view(-1)[here].copy_(part.flat.reshape(-1)[there])
    return end - first
