"""Weights that stay in their files until asked for, tensor by tensor.

So a model leaves a checkpoint on a machine that could not hold it: what is in memory is the tensor at hand.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusiontree.errors import RunError
from fusiontree.files import parse_json
from fusiontree.zero import layout

INDEX = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 8  # bytes, as the format's own writer pads its header
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors, that we write or read
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 2**26  # bytes written at a time


class Piece(NamedTuple):
    """Values that lie together in a file."""

    path: Path
    offset: int  # bytes from the file's start
    values: int


class Located(NamedTuple):
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece]


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and kept by nobody here."""

    def __init__(self, located: Mapping[str, Located]):
        self.located = located

    def misfit(self, model: nn.Module, prefix: str = "") -> str | None:
        """Name of the first parameter of `model`, behind `prefix`, that is not here in its shape; None: all are."""
        for name, parameter in model.named_parameters(prefix.rstrip(".")):
            located = self.located.get(name)
            if located is None or located.shape != tuple(parameter.shape):
                return name
        return None

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, pieces = self.located[name]
        buffer = torch.empty(sum(piece.values for piece in pieces), dtype=dtype)
        raw: Any = memoryview(buffer.view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        for path, offset, count in pieces:
            end = done + count * dtype.itemsize
            with open(path, "rb", buffering=0) as stream:
                stream.seek(offset)
                while done < end:
                    read = stream.readinto(raw[done:end])
                    if not read:
                        raise RunError(f"{path} ends inside the tensor {name}; restore the file")
                    done += read
        return buffer.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.located)

    def __len__(self) -> int:
        return len(self.located)


# --- DeepSpeed's checkpoints -----------------------------------------------------------------------------------------


def from_checkpoint(folder: Path, zero_stage: int, trust: bool = False) -> TensorFiles:
    """The model's fp32 weights in DeepSpeed's files under `folder`, written at `zero_stage` by any number of ranks.

    Args:
        trust: unpickle whatever the files hold, which may run any code.

    Raises:
        UserError: the files hold more than tensors and DeepSpeed's own few objects, and are not trusted.
        RunError: files of a rank are missing, or hold something else than DeepSpeed writes.
    """
    read = layout.opener(values=False, trust=trust)
    try:
        return TensorFiles(_of_stage_3(folder, read) if zero_stage == 3 else _of_whole_weights(folder, read))
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise RunError(f"{folder} is no checkpoint of DeepSpeed at ZeRO stage {zero_stage} ({error!r})") from None


def _of_whole_weights(folder: Path, read: layout.Open) -> dict[str, Located]:
    path, weights = layout.whole_weights(folder, read)
    return {
        name: Located(value.dtype, tuple(value.shape), [_piece(path, value, 0, value.numel())])
        for name, value in weights.items()
    }


def _of_stage_3(folder: Path, read: layout.Open) -> dict[str, Located]:
    pieces: dict[str, list[Piece]] = {}
    for part in layout.parts(folder, 3, read):
        pieces.setdefault(part.name, []).append(_piece(part.path, part.flat, part.start, part.length))
    shapes = layout.shapes(folder, read)
    return {name: Located(torch.float32, shape, pieces[name]) for name, shape in shapes.items()}


def _piece(path: Path, value: Tensor, start: int, length: int) -> Piece:
    """Where `length` elements of `value` from `start` on lie."""
    if not value.is_contiguous():
        raise RunError(f"{path} holds a tensor whose values do not lie together; it is none of this project's")
    stored: Any = value.untyped_storage()._checkpoint_offset
    return Piece(path, stored + (int(value.storage_offset()) + start) * value.dtype.itemsize, length)


# --- safetensors -----------------------------------------------------------------------------------------------------


def from_safetensors(folder: Path) -> TensorFiles:
    """The tensors of all safetensors files in `folder`.

    Raises:
        RunError: a file is damaged, or the index names one outside the folder or a tensor that its file does not hold.
    """
    index = folder / INDEX
    located: dict[str, Located] = {}
    if not index.is_file():
        return TensorFiles(_located_in(folder / "model.safetensors"))
    try:
        places = {name: str(file) for name, file in parse_json(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index} is damaged ({error!r}); export the model again") from None
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise RunError(f"{index} names {name}, which leaves its folder; use an export that does not")
        located |= _located_in(folder / name)
    if set(located) != set(places):
        raise RunError(f"{index} and the files it names disagree; export the model again")
    return TensorFiles(located)


def _located_in(path: Path) -> dict[str, Located]:
    total = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(min(size, total)))
        header.pop("__metadata__", None)
        located = {
            name: Located(
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                [Piece(path, 8 + size + entry["data_offsets"][0], prod(entry["shape"]))],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{path} is damaged ({error!r}); export the model again") from None
    for name, (dtype, _, (piece,)) in located.items():
        if piece.offset + piece.values * dtype.itemsize > total:
            raise RunError(f"{path} ends inside the tensor {name}; export the model again")
    return located


class Spec(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path, read: Callable[[str], Tensor], specs: Mapping[str, Spec], max_shard_bytes: int
) -> Iterator[str]:
    """Write the tensors of `specs` into files of at most `max_shard_bytes` each, or one tensor.

    The library's own writer holds a whole file's tensors, twice; here it is the tensor at hand.

    Args:
        read: gives a tensor by its name, in any dtype. specs: by name, in the order of the files.

    Yields:
        The name of each tensor that has been written.
    """
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not shards or spec.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= spec.size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        yield from _write_shard(folder / file, read, {name: specs[name] for name in names})
    if len(shards) > 1:
        total = {"total_size": sum(spec.size for spec in specs.values())}
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": places}, indent=1))


def _write_shard(path: Path, read: Callable[[str], Tensor], specs: Mapping[str, Spec]) -> Iterator[str]:
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
