"""A run that starts from an exported model has its weights at any ZeRO stage and its shape."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from conftest import SMALL, build, cli, settings, write_run

from fusiontree.checkpoint.tensor_files import INDEX, from_safetensors
from fusiontree.config import RunConfig, load_config
from fusiontree.data.format import Dataset
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError
from fusiontree.evaluate.options import EvalOptions
from fusiontree.evaluate.tasks import evaluate
from fusiontree.export.exporter import export
from fusiontree.training.engine_setup import build_model
from fusiontree.training.init_weights import check_init_from

SHAPE = {**dataclasses.asdict(SMALL), "vocab_size": 512, "layer_kinds": ("mamba", "hybrid", "attention")}
KINDS = "[mamba,hybrid,attention]"


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a pruned model."""
    folder = tmp_path_factory.mktemp("runs")
    shape = {"vocab_size": 512, "layer_kinds": ("mamba", "hybrid", "attention")}
    config = dataclasses.replace(SMALL, **shape)
    write_run(folder / "run", config, build(**shape).state_dict(), tokenizer_folder, 0, 1)
    export(folder / "run", folder / "out")
    return folder / "out"


def config_for(exported: Path, *changes: str) -> RunConfig:
    values = {f"model.{name}": value for name, value in SHAPE.items() if value is not None}
    values |= {"model.layer_kinds": KINDS, "init_from": exported, "data.seq_len": 128, "batch.tokens": 256}
    return load_config("tiny", [*(f"{key}={value}" for key, value in values.items()), "batch.micro_rows=2", *changes])


def test_the_model_starts_with_the_exported_weights(exported: Path) -> None:
    config = config_for(exported, "model.rope_base=2000000.0", "model.window=64")
    model = build_model(config, World(0, 1, torch.device("cpu")), {"zero_optimization": {"stage": 1}})
    weights = from_safetensors(exported)
    state = model.state_dict()
    assert {f"model.{name}" for name in state} == set(weights)
    assert all(torch.equal(state[name.removeprefix("model.")], value) for name, value in weights.items())
    assert model.config.rope_base == 2_000_000


def test_exported_or_resumed_weights_are_not_initialized_at_random_first(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, settings = World(0, 1, torch.device("cpu")), {"zero_optimization": {"stage": 1}}

    def forbid(*_: object, **options: object) -> None:
        assert options["generator"] is None, "random"  # torch's own modules start on meta, at no cost

    monkeypatch.setattr(torch.nn.init, "normal_", forbid)
    build_model(config_for(exported), world, settings)
    resuming = build_model(config_for(tmp_path / "gone"), world, settings, resuming=True)
    assert not any(parameter.any() for parameter in resuming.parameters())
    with pytest.raises(AssertionError, match="random"):
        build_model(config_for(exported, "init_from=null"), world, settings)


def test_a_run_at_zero3_starts_at_the_exports_loss_and_resumes_without_it(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    values = {f"model.{name}": value for name, value in SHAPE.items() if value is not None}
    start = shutil.copytree(exported, tmp_path / "start")
    values |= {"model.layer_kinds": KINDS, "init_from": start, "deepspeed": "zero3", "schedule.steps": 2}
    values |= {"schedule.warmup_steps": 0, "checkpoint.every": 1}
    words = [*settings(shards, tmp_path, name="next"), *(f"{key}={value}" for key, value in values.items())]
    cli("train", "tiny", *words)
    run = tmp_path / "next"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    held_out = evaluate(exported, ["perplexity"], EvalOptions(shards, seq_len=128, limit=6))["perplexity"]
    assert first["val_loss"] == pytest.approx(held_out["loss"], rel=1e-5)
    assert str(start) in (run / "config.yaml").read_text()
    shutil.rmtree(start)
    cli("train", "tiny", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "model.layer_kinds=null",
            r"set model\.layer_kinds=\[mamba,hybrid,attention\] \(fields that may differ: rope_base",
        ),
        ("model.mlp_size=64", r"set model\.mlp_size=48"),
        ("model.fusion=token", r"set model\.fusion=channel"),
    ],
)
def test_another_shape_is_refused_with_the_values_to_set(exported: Path, shards: Path, change: str, words: str) -> None:
    manifest = Dataset(shards).manifest
    check_init_from(config_for(exported, "model.max_positions=256", "model.branch_drop=0.1"), manifest)
    with pytest.raises(UserError, match=words) as caught:
        check_init_from(config_for(exported, change), manifest)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_and_a_folder_without_an_export_are_refused(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    manifest = Dataset(shards).manifest
    with pytest.raises(UserError, match="is not an exported model"):
        check_init_from(config_for(tmp_path), manifest)
    facts = json.loads((exported / "fusiontree.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (tmp_path / "fusiontree.json").write_text(json.dumps({**facts, "tokenizer_fingerprint": "other"}))
    with pytest.raises(UserError, match="tokenizer"):
        check_init_from(config_for(tmp_path), manifest)


def test_a_damaged_export_is_refused_before_the_run_folder_is_made(
    exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = shutil.copytree(exported, tmp_path / "start")
    values = [f"model.{name}={value}" for name, value in SHAPE.items() if value is not None and name != "layer_kinds"]
    overrides = [*settings(shards, tmp_path, name="next"), *values, f"model.layer_kinds={KINDS}", f"init_from={start}"]
    intact = (start / "model.safetensors").read_bytes()
    for content, words in (
        (intact[:-1], "model.safetensors is damaged (its size differs from that of its tensors)"),
        (intact[:100], "model.safetensors is damaged (it is not JSON)"),
        (b"", "model.safetensors is damaged (its header has no valid size)"),
    ):
        (start / "model.safetensors").write_bytes(content)
        said = ranks.run(["train", "tiny", *overrides], tmp_path, code=1)
        assert words in said, said
        assert not (tmp_path / "next").exists()
    for index in ("{}", "[]", '{"weight_map": 3}'):
        (start / INDEX).write_text(index)
        with pytest.raises(RunError, match="index.json is damaged"):
            from_safetensors(start)


def test_weights_that_do_not_match_their_configuration_are_refused(exported: Path, tmp_path: Path) -> None:
    changed = json.loads((exported / "config.json").read_text()) | {"mlp_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    config = config_for(tmp_path, "model.mlp_size=64")
    with pytest.raises(RunError, match="its weights do not match its config.json"):
        build_model(config, World(0, 1, torch.device("cpu")), {"zero_optimization": {"stage": 1}})
