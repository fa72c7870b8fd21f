"""Weights are read from a checkpoint of any ZeRO stage tensor by tensor, without running pickled code."""

import dataclasses
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Hostile, build, in_process, write_layout, write_run
from safetensors.torch import load_file, save_file

from fusiontree.checkpoint import store, tensor_files
from fusiontree.errors import RunError
from fusiontree.model.lm import HybridLM


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 1), (3, 2), (3, 3), (3, 5)])
def test_weights_are_read_at_any_stage_and_number_of_ranks(stage: int, ranks: int, tmp_path: Path) -> None:
    state = build().state_dict()
    write_layout(tmp_path / "c", state, stage, ranks)
    found = tensor_files.from_checkpoint(tmp_path / "c", stage)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    HybridLM(SMALL).load_state_dict(found)


def test_missing_files_of_a_rank_are_reported(tmp_path: Path) -> None:
    write_layout(tmp_path / "c", build().state_dict(), 3, 3)
    (tmp_path / "c" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(RunError, match="has the files of 2 of 3 ranks"):
        tensor_files.from_checkpoint(tmp_path / "c", 3)


def test_pickled_code_is_refused_in_one_line_unless_trusted(tokenizer_folder: Path, tmp_path: Path) -> None:
    mark, state = tmp_path / "mark", build().state_dict()
    folder = write_run(tmp_path / "run", SMALL, state, tokenizer_folder, 0, 1)
    torch.save({"module": state, "more": Hostile(mark)}, folder / "mp_rank_00_model_states.pt")
    store.write_manifest(folder)
    done = in_process("export", tmp_path / "run", tmp_path / "out", code=2)
    assert "contains more than tensors (os.makedirs)" in done.stderr
    assert "--trust-checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    tensor_files.from_checkpoint(folder, 0, trust=True)
    assert mark.exists()


def test_written_files_are_read_by_safetensors(tmp_path: Path) -> None:
    state = build().state_dict()
    specs = {name: tensor_files.Spec(tuple(value.shape), torch.bfloat16) for name, value in state.items()}
    written = list(tensor_files.write_safetensors(tmp_path, state.__getitem__, specs, 20_000))
    assert written == list(state)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in state.values())
    for file in files:
        loaded = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(loaded)
        assert len(loaded) == 1 or sum(2 * value.numel() for value in loaded.values()) <= 20_000
        assert all(torch.equal(value, state[name].bfloat16()) for name, value in loaded.items())
    again = tensor_files.from_safetensors(tmp_path)
    assert all(torch.equal(again[name], value.bfloat16()) for name, value in state.items())


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(RunError, match="is outside its folder"):
        tensor_files.from_safetensors(tmp_path / "out")


PEAK = """
import resource, sys
from fusiontree.cli import main
import fusiontree.export.exporter, transformers.modeling_utils, transformers.generation  # imports of any export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_the_peak_memory_of_an_export_is_a_few_tensors(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, hidden_size=256, mlp_size=2048, num_layers=20)
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in HybridLM(config).named_parameters()}
    state = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    total, largest = (4 * size(map(prod, shapes.values())) for size in (sum, max))
    assert total > 25 * largest
    write_run(tmp_path / "run", config, state, tokenizer_folder, 3, 2)
    command = ["export", tmp_path / "run", tmp_path / "out", "--max-shard-size", "50MB"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    assert peak < 6 * largest + 2**25, f"{peak / 2**20:.0f} MiB for {total / 2**20:.0f} MiB of weights"
    exported = tensor_files.from_safetensors(tmp_path / "out")
    assert all(torch.equal(exported[f"model.{name}"], value) for name, value in state.items())
