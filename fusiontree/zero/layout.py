"""The layout of DeepSpeed's checkpoint files: which file has which part of which parameter.

Below stage 3 ``mp_rank_00_model_states.pt`` has the full fp32 weights, which are also the master weights. Without ZeRO
it has the optimizer's states too. From stage 1 on, each rank writes its flat fp32 tensors and their moments to
``zero_pp_rank_N_mp_rank_00_optim_states.pt``. `fusiontree.zero.engine` shows how ZeRO cuts parameters into them.

This package is the only one that knows the names and the contents of these files.
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

from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.zero import internals

Reader = Callable[[Path], dict[str, Any]]  # reads a file, see `reader`
_MODEL_STATES = "mp_rank_00_model_states.pt"
_SUB_GROUP = 10**9  # elements of a flat tensor of stage 3 at which DeepSpeed starts another; its default sub_group_size


class Part(NamedTuple):
    """The part of one flattened parameter that is in one flat tensor of a file."""

    name: str  # of the parameter
    first: int  # index of the part's first element in the parameter
    length: int  # elements, without padding
    path: Path
    flat: Tensor  # fp32, the weights
    start: int  # index of the part's first element in `flat`
    states: Mapping[str, Any]  # of the optimizer, by its names: moments in the shape of `flat`, and scalars


def full_weights(folder: Path, read: Reader) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of a checkpoint below stage 3 that has the fp32 weights, and the weights by name."""
    return folder / _MODEL_STATES, read(folder / _MODEL_STATES)["module"]


def shapes(folder: Path, read: Reader) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a stage 3 checkpoint, in the order of its flat tensors."""
    groups = read(folder / f"zero_pp_rank_0_{_MODEL_STATES}")["param_shapes"]
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def file_of_rank(names: Sequence[str], rank: int) -> str:
    """Return the file among `names`, those of a checkpoint, with the optimizer's states for `rank`.

    On more ranks than the checkpoint was saved on, several ranks share a file.
    """
    optimizer = [name for name in names if name.endswith("_optim_states.pt")]
    files = optimizer or [name for name in names if name.endswith(_MODEL_STATES)]
    own = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return own if own in files else files[rank % len(files)]


def parts(folder: Path, stage: int, read: Reader, names: Sequence[str] = (), rank: int | None = None) -> Iterator[Part]:
    """Yield the parts of all parameters; those of one parameter are in order.

    Args:
        folder: the checkpoint's.
        stage: ZeRO stage that it was saved at.
        read: reads a file.
        names: of the parameters in the optimizer's order. Needed at stage 0, whose files lack them.
        rank: read only the file of this rank, and count `first` from the first element in it; None: read all files.

    Raises:
        RunError: files of a rank are missing.
    """
    if stage == 0:
        yield from _parts_stage_0(folder / _MODEL_STATES, read, names)
        return
    sizes = {name: math.prod(shape) for name, shape in shapes(folder, read).items()} if stage == 3 else {}
    before: Counter[str] = Counter()  # elements of each parameter in the files of lower ranks
    ranks = len(list(folder.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    for number in range(ranks) if rank is None else (rank,):
        path = folder / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        states = read(path)["optimizer_state_dict"]
        count = states["partition_count"]
        saved_ranks = count if stage == 3 else count[0]  # below stage 3 a list with an entry per group
        if saved_ranks != ranks:
            raise RunError(f"{folder} has the files of {ranks} of {saved_ranks} ranks; restore the missing files")
        found = _parts_stage_3(path, states, sizes, ranks, number) if stage == 3 else _parts_stage_1_2(path, states)
        for part in found:
            yield part._replace(first=before[part.name])
            before[part.name] += part.length


def _parts_stage_0(path: Path, read: Reader, names: Sequence[str]) -> Iterator[Part]:
    contents = read(path)
    for index, name in enumerate(names):
        weights = contents["module"][name]
        yield Part(name, 0, weights.numel(), path, weights, 0, contents["optimizer"]["state"].get(index, {}))


def _parts_stage_1_2(path: Path, contents: dict[str, Any]) -> Iterator[Part]:
    """Yield the parts in a rank's file of stage 1 or 2; `first` is still 0."""
    for number, flat in enumerate(contents["single_partition_of_fp32_groups"]):
        states = contents["base_optimizer_state"]["state"].get(number, {})
        for name, address in contents["param_slice_mappings"][number].items():
            yield Part(name, 0, address.numel, path, flat, address.start, states)


def _parts_stage_3(
    path: Path, contents: dict[str, Any], sizes: Mapping[str, int], ranks: int, rank: int
) -> Iterator[Part]:
    """Yield the parts in a rank's file of stage 3; `first` is still 0.

    Every rank has ceil(size / ranks) elements of each parameter, in the order of `sizes`. On the last ranks some or all
    of them are padding. Sub-groups end between parameters, but nothing here relies on it.
    """
    flats, states = contents["fp32_flat_groups"], contents["optimizer_state_dict"]["state"]
    start = 0  # in the concatenation of `flats`
    for name, size in sizes.items():
        share = math.ceil(size / ranks)
        real = min(share, max(0, size - rank * share))  # without padding
        for number, first, length in _overlaps(flats, start, real):
            yield Part(name, 0, length, path, flats[number], first, states.get(number, {}))
        start += share


def _overlaps(flats: Sequence[Tensor], start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first element and length of each overlap of `flats` with a range of their concatenation."""
    for number, flat in enumerate(flats):
        first, end = max(start, 0), min(start + count, flat.numel())
        if first < end:
            yield number, first, end - first
        start -= flat.numel()


# --- files without a run ---------------------------------------------------------------------------------------------


def checkpoint_files(
    groups: Sequence[Mapping[str, torch.Size]], stage: int, ranks: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and contents of the files that DeepSpeed saves, with weights only, without optimizer states.

    The tensors are not initialized; in FakeTensorMode they take no memory.

    Args:
        groups: shapes of the parameters by name, for each of the optimizer's groups.
        stage: of ZeRO.
        ranks: number of partitions at stage 3.
    """
    if stage < 3:
        yield _MODEL_STATES, {"module": {name: torch.empty(shape) for group in groups for name, shape in group.items()}}
        return
    sub_groups: list[dict[str, torch.Size]] = []
    flats: list[int] = []  # elements per sub-group on one rank
    for group in groups:
        for number, (name, shape) in enumerate(group.items()):
            if number == 0 or flats[-1] >= _SUB_GROUP:
                sub_groups.append({})
                flats.append(0)
            sub_groups[-1][name] = shape
            flats[-1] += math.ceil(shape.numel() / ranks)
    shared = {"buffer_names": [], "param_shapes": sub_groups, "shared_params": {}, "module": {}}
    for rank in range(ranks):
        yield f"zero_pp_rank_{rank}_{_MODEL_STATES}", shared
        states = {"zero_stage": stage, "partition_count": ranks, "optimizer_state_dict": {"state": {}}}
        states["fp32_flat_groups"] = [torch.empty(size) for size in flats]
        yield f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": states}


# --- reading without running pickled code ----------------------------------------------------------------------------


def reader(values: bool, trust: bool = False) -> Reader:
    """Return a function that reads a checkpoint file without running any code in it.

    Args:
        values: map tensors into memory and read values on use; else tensors have only their position in the file.
        trust: unpickle arbitrary objects, which can run any code.

    Raises:
        UserError (when reading): a file contains more than tensors and DeepSpeed's own plain objects, and is not
            trusted.
        RunError (when reading): it is missing or unreadable.
    """

    def read(path: Path) -> dict[str, Any]:
        inert: Any = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in internals.PICKLED]
        allowed = contextlib.nullcontext() if trust else torch.serialization.safe_globals(inert)
        # a fake tensor has no memory, but torch.load notes the offset of its storage in the file
        fake: Any = contextlib.nullcontext() if values else FakeTensorMode()
        try:
            with allowed, fake:
                return torch.load(path, "cpu", weights_only=not trust, mmap=values)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} contains more than tensors ({found[1] if found else 'pickled objects'}), and unpickling that "
                "can run arbitrary code; if you trust its source, add --trust-checkpoint"
            ) from None
        except FileNotFoundError:
            raise RunError(f"{path} is missing; restore the checkpoint or use another one") from None
        except Exception as error:  # of damaged files: torch's parser and pickle raise almost any class
            raise RunError(
                f"{path} cannot be read ({short_cause(error)}); restore the checkpoint or use another one"
            ) from None

    return read


class _Inert:
    """A placeholder for a pickled object: its attributes without its code."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
