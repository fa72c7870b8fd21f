"""Weights read from files on demand, one tensor at a time.

A model can be larger than the memory of the machine that exports it: only the tensor in use is in memory.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fusiontree.errors import RunError, short_cause
from fusiontree.run.state_files import Count, DamagedError, Stored, open_regular, parse_stored, read_stored
from fusiontree.zero import layout

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 8  # bytes; the safetensors library pads its header to the same multiple
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in a safetensors header
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _DTYPE_NAMES.items()}
_MAX_HEADER = 10**8  # bytes; the safetensors library has the same limit
_BLOCK = 2**26  # bytes per write


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name; each access reads the tensor from its file again, and nothing is cached."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]):
        self.shapes, self._read = shapes, read

    def misfit(self, model: nn.Module, stored_name: Callable[[str], str] = str) -> str | None:
        """Return the first parameter of `model`, by its stored name, that is missing here or has another shape."""
        for name, parameter in model.named_parameters():
            if self.shapes.get(stored_name(name)) != tuple(parameter.shape):
                return stored_name(name)
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
    locate = _Locator()
    try:
        return _locate_stage_3(folder, read, locate) if zero_stage == 3 else _locate_unpartitioned(folder, read, locate)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise RunError(
            f"{folder} is not a DeepSpeed checkpoint of ZeRO stage {zero_stage} ({short_cause(error)}); use another one"
        ) from None


def _locate_unpartitioned(folder: Path, read: layout.Reader, locate: "_Locator") -> dict[str, StoredTensor]:
    path, weights = layout.full_weights(folder, read)
    return {
        name: StoredTensor(value.dtype, tuple(value.shape), [locate(path, value, 0, value.numel())])
        for name, value in weights.items()
    }


def _locate_stage_3(folder: Path, read: layout.Reader, locate: "_Locator") -> dict[str, StoredTensor]:
    extents: dict[str, list[Extent]] = {}
    for part in layout.parts(folder, 3, read):
        extents.setdefault(part.name, []).append(locate(part.path, part.flat, part.start, part.length))
        if part.flat.dtype != torch.float32:
            raise RunError(
                f"{part.path} has weights in {part.flat.dtype} instead of fp32; use an unmodified checkpoint"
            )
    shapes = layout.shapes(folder, read)
    for name, shape in shapes.items():
        if sum(extent.values for extent in extents[name]) != prod(shape):
            raise RunError(f"{folder} has another number of values of {name} than its shape; use another checkpoint")
    return {name: StoredTensor(torch.float32, shape, extents[name]) for name, shape in shapes.items()}


class _Locator:
    """Positions of tensors in files that torch.load read in FakeTensorMode, checked against the files' archives.

    That mode checks no bounds: it enlarges the storage of a tensor that exceeds it, and would read a neighbor's bytes.
    """

    def __init__(self) -> None:
        self._records: dict[Path, dict[int, int]] = {}

    def __call__(self, path: Path, value: Tensor, start: int, length: int) -> Extent:
        """Return where `length` elements of `value`, from `start`, are in the file `path`.

        Raises:
            RunError: they are not inside one storage of the file.
        """
        if path not in self._records:
            self._records[path] = _storages(path)
        stored: Any = value.untyped_storage()._checkpoint_offset
        first, size = int(value.storage_offset()) + start, value.dtype.itemsize
        if not value.is_contiguous() or (first + length) * size > self._records[path].get(stored, -1):
            raise RunError(
                f"{path} contains a tensor that is not contiguous inside its storage, as all that FusionTree saves "
                "are; use an unmodified checkpoint"
            )
        return Extent(path, stored + first * size, length)


def _storages(path: Path) -> dict[int, int]:
    """Return the bytes of each uncompressed entry of a file of torch.save, by its offset in the file."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
            for entry in archive.infolist():
                stream.seek(entry.header_offset + 26)
                name_and_extra = struct.unpack("<HH", stream.read(4))  # of the entry's own header, which may differ
                if entry.compress_type == zipfile.ZIP_STORED:
                    found[entry.header_offset + 30 + sum(name_and_extra)] = entry.file_size
    except (zipfile.BadZipFile, struct.error):
        raise RunError(f"{path} is not a file of torch.save; use an unmodified checkpoint") from None
    return found


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


class _Index(Stored):
    weight_map: dict[str, str]


class _Entry(Stored):
    """A tensor in a safetensors header."""

    dtype: Literal["F32", "BF16", "F16"]
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]  # bytes after the header


class _Header(Stored):
    """A safetensors header: its tensors by name, and metadata."""

    __pydantic_extra__: dict[str, _Entry] = Field(init=False)
    metadata: dict[str, str] = Field(default={}, alias="__metadata__")


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
        names = read_stored(index, _Index).weight_map
    except DamagedError as error:
        raise RunError(f"{index} is damaged ({short_cause(error)}); export the model again") from None
    for file in sorted(set(names.values())):
        if Path(file).name != file or not file.isprintable():
            raise RunError(f"{index} names {file!r}, which is outside its folder; export the model again")
    return {name: index.parent / file for name, file in names.items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file.

    Raises:
        RunError: it is damaged, or its tensors do not follow each other in the header's order. The library accepts
            exchanged offsets, but every writer that we know writes tensors in the header's order.
    """
    try:
        with open_regular(path) as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= _MAX_HEADER:
                raise DamagedError("its header has no valid size")
            found: dict[str, _Entry] = parse_stored(stream.read(size), _Header).model_extra or {}
            end = 0
            for name, entry in found.items():
                length = prod(entry.shape) * _ITEM_BYTES[entry.dtype]
                if entry.data_offsets != (end, end + length):
                    raise DamagedError(f"the offsets of {name!r} are not those of the next {length:,} bytes")
                end += length
            if stream.seek(0, os.SEEK_END) != 8 + size + end:
                raise DamagedError("its size differs from that of its tensors")
    except FileNotFoundError:
        raise RunError(f"{path} is missing; export the model again") from None
    except DamagedError as error:
        raise RunError(f"{path} is damaged ({short_cause(error)}); export the model again") from None
    return {name: entry.shape for name, entry in found.items()}


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
