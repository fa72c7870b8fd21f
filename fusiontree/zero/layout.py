"""Which of DeepSpeed's files holds which part of which parameter: the one place that knows how ZeRO lays them out.

Below stage 3 a file has the whole fp32 weights, which are the master weights themselves; without ZeRO the optimizer's
states stand beside them. Stages 1 and 2 cut each group of parameters into equal stretches, wherever that cuts a
parameter; stage 3 cuts each parameter. A rank packs what is its own into flat tensors, in a file of its own.
"""

import contextlib
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontree.errors import RunError, UserError

Open = Callable[[Path], dict[str, Any]]  # reads a file, see `opener`
_WHOLE = "mp_rank_00_model_states.pt"
_SUB_GROUP = 10**9  # elements of a flat tensor of stage 3 from which on DeepSpeed begins another
# what DeepSpeed pickles beside tensors; inert stand-ins take their place, so that none of its code runs
_PICKLED_BY_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class Part(NamedTuple):
    """A stretch of a flattened parameter in a file."""

    name: str  # the parameter's
    first: int  # element of the parameter that it begins with
    length: int
    path: Path
    flat: Tensor  # fp32; the stretch of weights lies in it
    start: int  # element of `flat` that the stretch begins with
    kept: Mapping[str, Any]  # by the optimizer's names: moments, each laid out like `flat`, and what it keeps once


def whole_weights(folder: Path, read: Open) -> tuple[Path, dict[str, Tensor]]:
    """The fp32 weights of a checkpoint below stage 3 by name, and their file."""
    return folder / _WHOLE, read(folder / _WHOLE)["module"]


def shapes(folder: Path, read: Open) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a checkpoint of stage 3, in the order in which it has flattened them."""
    groups = read(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def parts(folder: Path, stage: int, read: Open, names: Sequence[str] = ()) -> Iterator[Part]:
    """The parts of all parameters, those of one in their order.

    Args:
        folder: the checkpoint's.
        stage: ZeRO stage that it was saved at.
        names: of the parameters in the optimizer's order, which no file of stage 0 tells.

    Raises:
        RunError: files of a rank are missing.
    """
    if stage == 0:
        yield from _whole(folder / _WHOLE, read, names)
        return
    sizes = {name: math.prod(shape) for name, shape in shapes(folder, read).items()} if stage == 3 else {}
    before: Counter[str] = Counter()  # elements of each parameter that lower ranks hold
    ranks = len(list(folder.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    for rank in range(ranks):
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        states = read(path)["optimizer_state_dict"]
        count = states["partition_count"]
        of = count if stage == 3 else count[0]  # by group
        if of != ranks:
            raise RunError(f"{folder} has the files of {ranks} ranks of {of}; restore them")
        for part in _partitions(path, states, sizes, ranks, rank) if stage == 3 else _fragments(path, states):
            yield part._replace(first=before[part.name])
            before[part.name] += part.length


def _whole(path: Path, read: Open, names: Sequence[str]) -> Iterator[Part]:
    states = read(path)
    for index, name in enumerate(names):
        weights = states["module"][name]
        yield Part(name, 0, weights.numel(), path, weights, 0, states["optimizer"]["state"].get(index, {}))


def _fragments(path: Path, states: dict[str, Any]) -> Iterator[Part]:
    """What a rank holds at stages 1 and 2."""
    for number, flat in enumerate(states["single_partition_of_fp32_groups"]):
        kept = states["base_optimizer_state"]["state"].get(number, {})
        for name, place in states["param_slice_mappings"][number].items():
            yield Part(name, 0, place.numel, path, flat, place.start, kept)


def _partitions(path: Path, states: dict[str, Any], sizes: Mapping[str, int], ranks: int, rank: int) -> Iterator[Part]:
    """What a rank holds at stage 3: as much of each parameter as any other, the last of it padding where need be."""
    flats, kept = states["fp32_flat_groups"], states["optimizer_state_dict"]["state"]
    start = 0
    for name, size in sizes.items():
        share = math.ceil(size / ranks)
        for number, place, length in _cut(flats, start, min(share, max(0, size - rank * share))):
            yield Part(name, 0, length, path, flats[number], place, kept.get(number, {}))
        start += share


def _cut(flats: Sequence[Tensor], start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Where `count` elements from `start` on lie of `flats`, taken as one: number, first element and length in each."""
    for number, flat in enumerate(flats):
        first, end = max(start, 0), min(start + count, flat.numel())
        if first < end:
            yield number, first, end - first
        start -= flat.numel()


# --- files of no run -------------------------------------------------------------------------------------------------


def files(groups: Sequence[Mapping[str, torch.Size]], stage: int, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What DeepSpeed saves of weights alone, without the optimizer's states: names of files and what they hold.

    The tensors are not filled; in FakeTensorMode they take no memory.

    Args:
        groups: shapes of the parameters by name, for each of the optimizer's groups.
        stage: of ZeRO.
        ranks: that stage 3 cuts each parameter among.
    """
    if stage < 3:
        yield _WHOLE, {"module": {name: torch.empty(shape) for group in groups for name, shape in group.items()}}
        return
    cut: list[dict[str, torch.Size]] = []
    flats: list[int] = []  # elements of each on one rank
    for group in groups:
        for number, (name, shape) in enumerate(group.items()):
            if number == 0 or flats[-1] >= _SUB_GROUP:
                cut.append({})
                flats.append(0)
            cut[-1][name] = shape
            flats[-1] += math.ceil(shape.numel() / ranks)
    shared = {"buffer_names": [], "param_shapes": cut, "shared_params": {}, "module": {}}
    for rank in range(ranks):
        yield f"zero_pp_rank_{rank}_{_WHOLE}", shared
        states = {"zero_stage": stage, "partition_count": ranks, "optimizer_state_dict": {"state": {}}}
        states["fp32_flat_groups"] = [torch.empty(size) for size in flats]
        yield f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": states}


# --- reading without running what is read ----------------------------------------------------------------------------


def opener(values: bool, trust: bool = False) -> Open:
    """What reads a file of a checkpoint without running any code in it.

    Args:
        values: tensors have theirs, read from the file when they are used; else they know their place in the file only.
        trust: unpickle whatever the files hold, which may run any code.

    Raises:
        UserError (when reading): a file holds more than tensors and DeepSpeed's own few objects, and is not trusted.
        RunError (when reading): it is missing, or cannot be read.
    """

    def read(path: Path) -> dict[str, Any]:
        inert: Any = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _PICKLED_BY_DEEPSPEED]
        known = contextlib.nullcontext() if trust else torch.serialization.safe_globals(inert)
        placeless: Any = contextlib.nullcontext() if values else FakeTensorMode()
        try:
            with known, placeless:
                return torch.load(path, "cpu", weights_only=not trust, mmap=values)
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} holds more than tensors ({what[1] if what else 'pickled objects'}), and unpickling that can "
                "run any code; if you trust where it comes from, add --trust-checkpoint"
            ) from None
        except FileNotFoundError:
            raise RunError(f"{path} is missing; restore the checkpoint or use another one") from None
        except (RuntimeError, ModuleNotFoundError) as error:
            raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None

    return read


class _Inert:
    """In place of a pickled object: what it held and nothing of what it did."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
