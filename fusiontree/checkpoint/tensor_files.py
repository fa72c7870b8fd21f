"""Weights read from files on demand, one tensor at a time.

A model can be larger than the memory of the machine that exports it: only the tensor in use is in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fusiontree.errors import RunError, short_cause
from fusiontree.files import parse_json
from fusiontree.zero import layout

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 8  # bytes; the safetensors library pads its header to the same multiple
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in a safetensors header
_BLOCK = 2**26  # bytes per write


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name; each access reads the tensor from its file again, and nothing is cached."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]):
        self.shapes, self._read = shapes, read

    def misfit(self, model: nn.Module, prefix: str = "") -> str | None:
        """Return the first parameter of `model`, with `prefix`, that is missing here or has another shape; or None."""
        for name, parameter in model.named_parameters(prefix.rstrip(".")):
            if self.shapes.get(name) != tuple(parameter.shape):
                return name
        return None

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


# --- DeepSpeed's checkpoints -----------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """A contiguous range of values in a file."""

    path: Path
    offset: int  # bytes from the start of the file
    values: int


class StoredTensor(NamedTuple):
    """A tensor in the files of a checkpoint; at ZeRO stage 3 with one extent or more per rank."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: Sequence[Extent]  # in the order of the flattened tensor


def from_checkpoint(folder: Path, zero_stage: int, trust: bool = False) -> TensorFiles:
    """Return the model's fp32 weights in DeepSpeed's files; see `locate_weights` for arguments and errors."""
    stored = locate_weights(folder, zero_stage, trust)
    return TensorFiles({name: tensor.shape for name, tensor in stored.items()}, lambda name: _read(name, stored[name]))


def locate_weights(folder: Path, zero_stage: int, trust: bool = False) -> dict[str, StoredTensor]:
    """Locate the model's fp32 weights in DeepSpeed's files in `folder`.

    Args:
        folder: the checkpoint's.
        zero_stage: that the checkpoint was saved at, on any number of ranks.
        trust: unpickle arbitrary objects in the files, which can run any code.

    Raises:
        UserError: the files contain more than tensors and DeepSpeed's own plain objects, and are not trusted.
        RunError: files of a rank are missing, or the contents are not DeepSpeed's.
    """
    read = layout.reader(values=False, trust=trust)
    try:
        return _locate_stage_3(folder, read) if zero_stage == 3 else _locate_unpartitioned(folder, read)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise RunError(
            f"{folder} is not a DeepSpeed checkpoint of ZeRO stage {zero_stage} ({short_cause(error)}); use another one"
        ) from None


def _locate_unpartitioned(folder: Path, read: layout.Reader) -> dict[str, StoredTensor]:
    path, weights = layout.full_weights(folder, read)
    return {
        name: StoredTensor(value.dtype, tuple(value.shape), [_extent(path, value, 0, value.numel())])
        for name, value in weights.items()
    }


def _locate_stage_3(folder: Path, read: layout.Reader) -> dict[str, StoredTensor]:
    extents: dict[str, list[Extent]] = {}
    for part in layout.parts(folder, 3, read):
        extents.setdefault(part.name, []).append(_extent(part.path, part.flat, part.start, part.length))
    shapes = layout.shapes(folder, read)
    return {name: StoredTensor(torch.float32, shape, extents[name]) for name, shape in shapes.items()}


def _extent(path: Path, value: Tensor, start: int, length: int) -> Extent:
    """Return where `length` elements of `value`, from `start`, are in the file `path`."""
    if not value.is_contiguous():
        raise RunError(
            f"{path} contains a non-contiguous tensor, which FusionTree never saves; use an unmodified checkpoint"
        )
    stored: Any = value.untyped_storage()._checkpoint_offset  # set by torch.load in FakeTensorMode
    return Extent(path, stored + (int(value.storage_offset()) + start) * value.dtype.itemsize, length)


def _read(name: str, stored: StoredTensor) -> Tensor:
    """Read a tensor; `name` is for the error."""
    dtype, shape, extents = stored
    buffer = torch.empty(sum(extent.values for extent in extents), dtype=dtype)
    raw: Any = memoryview(buffer.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    for path, offset, count in extents:
        end = done + count * dtype.itemsize
        with open(path, "rb", buffering=0) as stream:
            stream.seek(offset)
            while done < end:
                read = stream.readinto(raw[done:end])
                if not read:
                    raise RunError(f"{path} ends inside the tensor {name}; restore the file or use another one")
                done += read
    return buffer.view(shape)


# --- safetensors -----------------------------------------------------------------------------------------------------


def from_safetensors(folder: Path) -> TensorFiles:
    """Return the tensors of all safetensors files in `folder`.

    A tensor is a private memory mapping of its file, so pages are read on use. Copy tensors that outlive the file.

    Raises:
        RunError: a file is damaged, or the index names one outside the folder or a tensor that its file does not have.
    """
    index = folder / INDEX
    indexed = _indexed_files(index) if index.is_file() else None
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in [folder / WEIGHTS] if indexed is None else sorted(set(indexed.values())):
        found = _shapes(path)
        files |= dict.fromkeys(found, path)
        shapes |= found
    if indexed is not None and indexed.keys() != files.keys():
        raise RunError(f"{index} and the files it names disagree; export the model again")

    def read(name: str) -> Tensor:
        # opened for each tensor: an open file keeps the pages of all tensors that were read resident
        with _opened(files[name]) as file:
            return file.get_tensor(name)

    return TensorFiles(shapes, read)


def _indexed_files(index: Path) -> dict[str, Path]:
    """Return the file of each tensor that `index` names."""
    try:
        names = {name: str(file) for name, file in parse_json(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index} is damaged ({short_cause(error)}); export the model again") from None
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise RunError(f"{index} names {file}, which is outside its folder; export the model again")
    return {name: index.parent / file for name, file in names.items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _opened(path: Path) -> Any:
    """Return `path` open for reading; the library checks its header against its size."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RunError(f"{path} is damaged ({short_cause(error)}); export the model again") from None


class Spec(NamedTuple):
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path, read: Callable[[str], Tensor], specs: Mapping[str, Spec], max_shard_bytes: int
) -> Iterator[str]:
    """Write tensors one at a time, because safetensors' own writer needs all tensors of a file in memory.

    Files have at most `max_shard_bytes` of tensors each; a larger tensor has its own file.

    Args:
        folder: for the files.
        read: returns a tensor by its name, in any dtype.
        specs: by name, in the order of the files.
        max_shard_bytes: of the tensors in a file, without its header.

    Yields:
        The name of each tensor after it is written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan: Any = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        yield from _write_shard(folder / file, read, {name: specs[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _write_shard(path: Path, read: Callable[[str], Tensor], specs: Mapping[str, Spec]) -> Iterator[str]:
    """Write one safetensors file: the header's length (8 bytes), the header, then the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (end, end + spec.size),
        }
        end += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            raw: Any = read(name).to(spec.dtype).contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, len(raw), _BLOCK):
                stream.write(raw[start : start + _BLOCK])
            yield name
