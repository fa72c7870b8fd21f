"""A checkpoint of one layout (number of ranks, ZeRO stage) for an engine of another.

ZeRO cuts the fp32 weights and the optimizer's moments into flat pieces, and where it cuts depends on the stage and on
the number of ranks. Both the files of a checkpoint and a running engine can tell which piece holds which part of which
parameter, so a load is a copy from pieces to pieces: exact, and without a whole copy of anything, for what an engine's
own pieces do not need stays on disk.
"""

from pathlib import Path
from typing import Any

import torch

from fusiontree.zero import layout
from fusiontree.zero.engine import Slot, copy_to_model, in_memory, optimizer_groups, slots
from fusiontree.zero.layout import Part


def load(engine: Any, checkpoint: Path, stage: int, trust: bool) -> None:
    """Give `engine` the weights and the optimizer's state of `checkpoint`; all ranks call it together.

    Args:
        engine: DeepSpeed's, of the same model and with the same optimizer.
        checkpoint: its folder.
        stage: ZeRO stage that it was saved at.
        trust: unpickle whatever the files hold, which may run any code.
    """
    groups = optimizer_groups(engine)
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
                for slot in slots(engine, number, group):
                    for part in parts[slot.name]:
                        _fill(slot, part, optimizer.state[slot.flat], fused)
                if engine.zero_optimization_stage() == 3:
                    engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        copy_to_model(engine)
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
