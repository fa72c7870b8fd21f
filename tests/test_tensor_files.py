"""Own readers of weights refuse offsets that are not those of the writer: none reads another tensor's bytes."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_layout
from safetensors.torch import save_file
from torch import Tensor

from fusiontree.checkpoint.tensor_files import WEIGHTS, from_checkpoint, from_safetensors
from fusiontree.errors import RunError

TENSORS = {name: torch.arange(4.0) + 10 * number for number, name in enumerate("abc")}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], tail: bytes = b"") -> None:
    """Change the header of a safetensors file in place."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:] + tail)


def exchange(header: dict[str, Any]) -> None:
    """Exchange the offsets of two tensors of one size, which the safetensors library accepts."""
    a, b = header["a"], header["b"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "exchanged": exchange,
    "shifted": lambda header: header["b"].update(data_offsets=[17, 33]),
    "overlapping": lambda header: header["b"].update(data_offsets=[0, 16]),
    "beyond the file": lambda header: header["c"].update(data_offsets=[32, 64]),
    "negative": lambda header: header["a"].update(data_offsets=[-16, 0]),
    "reversed": lambda header: header["a"].update(data_offsets=[16, 0]),
    "fraction": lambda header: header["a"].update(data_offsets=[0, 16.5]),
    "of another shape": lambda header: header["c"].update(shape=[5]),
    "of another type": lambda header: header["c"].update(dtype="I32"),
    "left out": lambda header: header.pop("b"),
    "huge": lambda header: header["c"].update(shape=[2**40, 2**40]),
    "not a tensor": lambda header: header.update(c=7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_safetensors_file_with_other_offsets_is_refused(change: Callable[[dict], object], tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    assert {name: value.tolist() for name, value in from_safetensors(tmp_path).items()} == {
        name: value.tolist() for name, value in TENSORS.items()
    }
    rewrite(tmp_path / WEIGHTS, change)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged \(.*\); export the model again"):
        from_safetensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"{]"])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        from_safetensors(tmp_path)
    save_file(TENSORS, tmp_path / WEIGHTS)
    rewrite(tmp_path / WEIGHTS, lambda header: None, tail=b"1234")
    with pytest.raises(RunError, match="its size differs from that of its tensors"):
        from_safetensors(tmp_path)


class _View:
    """A pickle of `count` elements from `start` of a tensor's storage, whatever its size."""

    def __init__(self, value: Tensor, start: int, count: int):
        storage = torch.storage.TypedStorage(wrap_storage=value.untyped_storage(), dtype=value.dtype, _internal=True)
        self.arguments = (storage, start, (count,), (1,), False, OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(("start", "count"), [(5, 10), (0, 12), (12, 1)])
def test_a_checkpoint_whose_tensor_exceeds_its_storage_is_refused(start: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    value, neighbor = torch.arange(10.0), torch.arange(10.0) + 100
    torch.save({"module": {"a": _View(value, 5, 5), "b": neighbor}}, path)
    assert from_checkpoint(tmp_path, 0)["a"].tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]
    torch.save({"module": {"a": _View(value, start, count), "b": neighbor}}, path)
    with pytest.raises(RunError, match="not contiguous inside its storage"):
        from_checkpoint(tmp_path, 0)


def test_partitions_that_do_not_make_up_the_shapes_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}
    write_layout(tmp_path / "checkpoint", state, 3, 2)
    assert from_checkpoint(tmp_path / "checkpoint", 3)["a"].tolist() == state["a"].tolist()
    path = tmp_path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    shapes = torch.load(path)
    shapes["param_shapes"][0]["a"] = torch.Size((4, 4))
    torch.save(shapes, path)
    with pytest.raises(RunError, match="another number of values of b than its shape"):
        from_checkpoint(tmp_path / "checkpoint", 3)
