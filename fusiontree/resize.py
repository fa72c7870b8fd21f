"""A checkpoint of one layout (number of ranks, ZeRO stage) for an engine of another.

ZeRO cuts the fp32 weights and the optimizer's moments into flat pieces, and where it cuts depends on the stage and on
the number of ranks. Both the files of a checkpoint and a running engine can tell which piece holds which part of which
parameter, so a load is a copy from pieces to pieces: exact, and without a whole copy of anything, for what an engine's
own pieces do not need stays on disk.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "weights"  # beside the optimizer's own names (exp_avg, ...) of what it keeps for each weight


class Piece(NamedTuple):
    """A part of a flattened parameter in a checkpoint."""

    first: int  # element of the parameter that the piece begins with
    tensors: dict[str, Tensor]  # 1-d and equally long, fp32 weights and moments by name; on disk until they are used
    scalars: dict[str, Any]  # what the optimizer keeps once for all of it: the number of its steps


class Slot(NamedTuple):
    """A part of a flattened parameter in an engine."""

    name: str
    first: int  # element of the parameter that it begins with
    length: int
    flat: Tensor  # what the optimizer steps; the slot is a stretch of it
    start: int  # element of `flat` that it begins with


def load(engine: Any, checkpoint: Path, stage: int, world_size: int) -> None:
    """Give `engine` the weights and the optimizer's state of `checkpoint`; all ranks call it together.

    Args:
        engine: DeepSpeed's, of the same model and with the same optimizer; not with states on NVMe.
        checkpoint: its folder.
        stage: ZeRO stage that it was saved at.
        world_size: ranks that saved it.
    """
    pieces = _read(checkpoint, stage, world_size, _names(engine))
    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for slot in _slots(engine):
            _fill(slot, pieces[slot.name], optimizer.state[slot.flat], fused)
        _spread(engine)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()


def _fill(slot: Slot, pieces: list[Piece], state: dict[str, Any], fused: bool) -> None:
    """Copy to `slot` what it holds of the parameter that `pieces` make up."""
    for piece in pieces:
        for name, tensor in piece.tensors.items():
            first, end = max(slot.first, piece.first), min(slot.first + slot.length, piece.first + len(tensor))
            if first >= end:
                continue
            if name != WEIGHTS and name not in state:
                state[name] = torch.zeros_like(slot.flat)
            flat = (slot.flat if name == WEIGHTS else state[name]).view(-1)
            start = slot.start + first - slot.first
            flat[start : start + end - first].copy_(tensor[first - piece.first : end - piece.first])
        for name, value in piece.scalars.items():
            # of its own: an optimizer counts in place
            state[name] = value.clone().to(slot.flat.device if fused else "cpu") if torch.is_tensor(value) else value


# --- what an engine holds --------------------------------------------------------------------------------------------


def _groups(engine: Any) -> list[list[Tensor]]:
    """The parameters by group of the optimizer, or by part of one, in order."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return zero.fp16_groups
    return zero.bit16_groups if stage > 0 else [group["params"] for group in zero.param_groups]


def _names(engine: Any) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    return [engine.param_names[parameter] for group in _groups(engine) for parameter in group]


def _slots(engine: Any) -> Iterator[Slot]:
    """What this rank's optimizer holds."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    for number, group in enumerate(_groups(engine)):
        for parameter in group:
            name = engine.param_names[parameter]
            if stage == 0:
                yield Slot(name, 0, parameter.numel(), parameter, 0)
            elif stage == 3:
                part, start, length = zero.grad_position[zero.get_param_id(parameter)]
                yield Slot(name, engine.global_rank * length, length, zero.fp32_partitioned_groups_flat[part], start)
            elif (place := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                here, there = place.lp_fragment_address, place.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[number]
                yield Slot(name, here.start, here.numel, flat, there.start)


def _spread(engine: Any) -> None:
    """Bring the optimizer's fp32 weights to the model's parameters, as DeepSpeed does behind a step or a load."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3:
        groups = zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        )
        for fp32, own, parameters in groups:
            own.copy_(fp32)
            for parameter, part in zip(parameters, zero.unflatten(own, parameters), strict=True):
                parameter.data = part
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def _read(checkpoint: Path, stage: int, world_size: int, names: list[str]) -> dict[str, list[Piece]]:
    """The pieces of every parameter; `names` in the optimizer's order."""
    if stage == 0:
        return dict(_whole(_open(checkpoint / "mp_rank_00_model_states.pt"), names))
    found: dict[str, list[Piece]] = {name: [] for name in names}
    sizes = _sizes(checkpoint) if stage == 3 else {}
    for rank in range(world_size):
        states = _open(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        own = _partitions(states, sizes, rank, world_size) if stage == 3 else _fragments(states, found)
        for name, piece in own:
            found[name].append(piece)
    return found


def _open(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, whose tensors are read when used. It needs pickle; its sha256 has been checked."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Elements by parameter, in the order in which ZeRO-3 has flattened them."""
    groups = _open(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    return {name: shape.numel() for group in groups for name, shape in group.items()}


def _whole(states: dict[str, Any], names: list[str]) -> Iterator[tuple[str, list[Piece]]]:
    """Without ZeRO a parameter is one piece."""
    for index, name in enumerate(names):
        kept = states["optimizer"]["state"].get(index, {})
        yield name, [_piece(0, states["module"][name], kept, 0, states["module"][name].numel())]


def _fragments(states: dict[str, Any], before: Mapping[str, list[Piece]]) -> Iterator[tuple[str, Piece]]:
    """Stages 1 and 2 cut a group into equal parts, wherever that cuts a parameter; `before`: what lower ranks hold."""
    for number, flat in enumerate(states["single_partition_of_fp32_groups"]):
        kept = states["base_optimizer_state"]["state"].get(number, {})
        for name, place in states["param_slice_mappings"][number].items():
            first = sum(len(piece.tensors[WEIGHTS]) for piece in before[name])
            yield name, _piece(first, flat, kept, place.start, place.numel)


def _partitions(
    states: dict[str, Any], sizes: Mapping[str, int], rank: int, world_size: int
) -> Iterator[tuple[str, Piece]]:
    """Stage 3 cuts each parameter into equal parts, the last one padded, and packs a rank's parts into flat tensors."""
    flats, kept = states["fp32_flat_groups"], states["optimizer_state_dict"]["state"]
    number = start = 0
    for name, size in sizes.items():
        length = math.ceil(size / world_size)
        while start == len(flats[number]):
            number, start = number + 1, 0
        real = min(length, max(0, size - rank * length))
        yield name, _piece(rank * length, flats[number], kept.get(number, {}), start, real)
        start += length


def _piece(first: int, flat: Tensor, kept: Mapping[str, Any], start: int, length: int) -> Piece:
    own = {name: value for name, value in kept.items() if torch.is_tensor(value) and value.dim() > 0}
    tensors = {name: tensor.reshape(-1)[start : start + length] for name, tensor in {WEIGHTS: flat, **own}.items()}
    return Piece(first, tensors, {name: value for name, value in kept.items() if name not in own})
