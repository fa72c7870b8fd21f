"""`bench export` writes a checkpoint in DeepSpeed's layout, exports it and removes both."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MICRO, cli, settings

from fusiontree.bench import export as bench
from fusiontree.checkpoint import store
from fusiontree.checkpoint.tensor_files import from_safetensors, locate_weights
from fusiontree.config import RunConfig, load_config
from fusiontree.errors import RunError, UserError
from fusiontree.model.lm import HybridLM, materialize, seeded_init
from fusiontree.zero import layout

SHAPE = [f"{key}={value}" for key, value in MICRO.items() if key.startswith("model.")]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the system's temporary folder to an empty one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def initial(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the initial weights of a run."""
    with torch.device("meta"):
        model = HybridLM(config.model)
    for _ in materialize(model, seeded_init(config.seed), torch.device("cpu")):
        pass
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_deepspeed_itself_reads_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    monkeypatch.setattr(layout, "_SUB_GROUP", 10_000)
    config = load_config("tiny", SHAPE)
    folder = bench.write_checkpoint(tmp_path / "run", config, 3, 3)
    assert store.verify(folder) == []
    found, expected = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name), initial(config)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    states = torch.load(folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    assert len(states["fp32_flat_groups"]) > 3


@pytest.mark.parametrize("stage", [0, 3])
def test_its_files_have_the_layout_of_a_real_run(stage: int, shards: Path, tmp_path: Path) -> None:
    changes = {"deepspeed": f"zero{stage}", "schedule__steps": 1, "schedule__warmup_steps": 0, "validation__every": 0}
    cli("train", "tiny", *settings(shards, tmp_path, name="run", **changes))
    real = tmp_path / "run" / "checkpoints" / "step-1"
    made = bench.write_checkpoint(tmp_path / "made", load_config(str(real / "config.yaml")), stage, 1)
    assert {path.name for path in made.iterdir()} == {path.name for path in real.iterdir()}
    read = layout.reader(values=False)
    if stage == 0:
        shapes = [{name: value.shape for name, value in layout.full_weights(f, read)[1].items()} for f in (made, real)]
        assert shapes[0] == shapes[1]
        return
    assert [*layout.shapes(made, read).items()] == [*layout.shapes(real, read).items()]
    (expected, found) = (
        [[*group] for group in read(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]]
        for folder in (real, made)
    )
    assert found == expected
    places = [[(p.name, p.start, p.length, p.flat.shape) for p in layout.parts(f, 3, read)] for f in (made, real)]
    assert places[0] == places[1]


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 2), ("bf16", 3)])
def test_the_figures_match_the_files(dtype: str, stage: int, tmp_path: Path) -> None:
    options = ["--dtype", dtype, "--ranks", 2, "--folder", tmp_path / "kept", "--json"]
    done = cli("bench", "export", "--preset", "tiny", *options, *SHAPE, f"deepspeed=zero{stage}")
    figures, run, out = json.loads(done.stdout), tmp_path / "kept" / "run", tmp_path / "kept" / "export"
    weights = initial(load_config("tiny", SHAPE))
    exported = from_safetensors(out)
    values = sum(value.numel() for value in weights.values())
    assert all(torch.equal(exported[f"model.{n}"], v.to(exported[f"model.{n}"].dtype)) for n, v in weights.items())
    assert figures["parameters"] == values
    assert (figures["zero_stage"], figures["ranks"], figures["dtype"]) == (stage, 2, dtype)
    assert figures["largest_tensor_bytes"] == 4 * max(value.numel() for value in weights.values())
    stored = locate_weights(run / "checkpoints" / "step-1", stage)
    assert len({extent.path for tensor in stored.values() for extent in tensor.extents}) == (2 if stage == 3 else 1)
    assert figures["checkpoint_bytes"] == sum(
        path.stat().st_size for path in (run / "checkpoints" / "step-1").iterdir()
    )
    assert figures["checkpoint_bytes"] > 4 * values
    assert figures["export_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert figures["export_bytes"] > values * (4 if dtype == "fp32" else 2)
    assert figures["peak_memory_bytes"] > 100 * 2**20  # torch alone
    assert figures["parity"] == json.loads((out / "parity.json").read_text())


def test_a_damaged_checkpoint_fails_the_benchmark_and_leaves_no_files(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = bench.write_checkpoint

    def damaged(*arguments: Any) -> Path:
        folder = write(*arguments)
        with open(folder / "mp_rank_00_model_states.pt", "r+b") as stream:
            stream.seek(-5000, os.SEEK_END)
            stream.write(b"?")
        return folder

    monkeypatch.setattr(bench, "write_checkpoint", damaged)
    with pytest.raises(RunError, match=r"the export of .*/run exited with code 1"):
        bench.bench_export("tiny", SHAPE)
    assert "mp_rank_00_model_states.pt does not match its sha256" in " ".join(capfd.readouterr().err.split())
    assert [*temporary.iterdir()] == []


def test_an_interrupted_benchmark_stops_the_export_and_leaves_no_files(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(process: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(bench, "_peak_resident", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.bench_export("tiny", SHAPE)
    assert started[0].returncode not in (0, None)
    assert [*temporary.iterdir()] == []


def test_the_peak_survives_freed_memory_and_excludes_the_parent() -> None:
    code = "held = b'x' * 2**28\ndel held\nprint()\ninput()"
    assert bench._peak_resident(os.getpid()) > 2**28 + 2**26  # this process
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        peak = bench._peak_resident(process.pid)
        process.communicate(b"\n")
    assert 2**28 <= peak < 2**28 + 2**26


def test_a_full_disk_is_refused_before_any_file_is_written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 70 * 2**30}))
    monkeypatch.setattr(bench, "write_checkpoint", lambda *_: pytest.fail("made all the same"))
    with pytest.raises(UserError, match=r"need 71\.3 GiB, but .* has 70\.0 GiB free"):
        bench.bench_export("13b", [], "bf16")
    with pytest.raises(UserError, match=r"need 94\.9 GiB"):
        bench.bench_export("13b", [], "fp32", folder=temporary / "deep" / "kept")
    assert [*temporary.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "tinny"], "tinny is neither a file nor a preset"),
        (["--preset", "tiny", "--ranks", "0"], "--ranks is 0; it must be at least 1"),
        (["--preset", "tiny", "deepspeed=zero9"], "deepspeed 'zero9' is neither"),
        (["--preset", "tiny", "--folder", "."], "--folder . exists and is not an empty folder"),
        (["--preset", "tiny", "--folder", "a.txt"], "--folder a.txt exists and is not an empty folder"),
        (["--preset", "tiny", "--folder", "a.txt/b"], "which is a file; name another"),
    ],
)
def test_user_errors_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    error = cli("bench", "export", *words, code=2, cwd=tmp_path).stderr
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
