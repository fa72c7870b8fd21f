"""Pruning follows the gates or the loss; invalid plans are refused; the folded branch replaces both."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, cli, write_run
from safetensors.torch import load_file, save_file

from fusiontree.bench.prune import bench_prune, half_pruned
from fusiontree.checkpoint import store
from fusiontree.cli import main
from fusiontree.config import load_config
from fusiontree.errors import UserError
from fusiontree.export.exporter import export
from fusiontree.export.options import ExportOptions
from fusiontree.inference.decoder import Decoder
from fusiontree.inference.loading import load_export
from fusiontree.prune import pruner
from fusiontree.prune.plan import (
    PrunedWeights,
    Pruning,
    branch_candidates,
    cache_bytes,
    head_candidates,
    make_plan,
    pruned_model,
    read_plan,
    select_cheapest,
)
from fusiontree.run.folder import CONFIG_FILE, GATES_FILE

IDS = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(0))
HALF = torch.full((3, 32), 0.5)


def unpruned(**changes: object) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    model = build(**changes)
    return dict(model.state_dict()), model


@pytest.mark.parametrize("kept", ["mamba", "attention"])
def test_pruning_the_closed_branch_of_a_saturated_gate_changes_nothing(kept: str) -> None:
    """A static gate of 1 or 0 passes only one branch; removing the other leaves the layer unchanged."""
    model = build(fusion="static")
    with torch.no_grad():
        model.blocks[1].fusion.bias.fill_(40.0 if kept == "mamba" else -40.0)
    gates = torch.stack([torch.sigmoid(block.fusion.bias.detach()) for block in model.blocks])
    pruning = Pruning.none(model.config).replace(1, kept)  # type: ignore[arg-type]
    pruned = pruned_model(model.state_dict(), model.config, pruning, gates)
    torch.testing.assert_close(pruned(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_mean_gate_is_folded_by_channel() -> None:
    state, _ = unpruned()
    gates = torch.rand(3, 32, generator=torch.Generator().manual_seed(1))
    pruning = Pruning.none(SMALL).replace(0, "mamba").replace(2, "attention")
    pruned = pruned_model(state, SMALL, pruning, gates).state_dict()
    for name, factor in (("blocks.0.mamba", 2 * gates[0]), ("blocks.2.attention", 2 * (1 - gates[2]))):
        expected = state[f"{name}.out_proj.weight"] * factor[:, None]
        assert torch.equal(pruned[f"{name}.out_proj.weight"], expected)
    assert torch.equal(pruned["blocks.1.mamba.out_proj.weight"], state["blocks.1.mamba.out_proj.weight"])
    assert not [name for name in pruned if name.startswith(("blocks.0.attention", "blocks.2.mamba", "blocks.0.fusion"))]


def test_a_folded_weight_keeps_its_dtype() -> None:
    state, _ = unpruned()
    low = {name: value.bfloat16() for name, value in state.items()}
    pruned = PrunedWeights(low, SMALL, Pruning.none(SMALL).replace(0, "mamba"), torch.full((3, 32), 0.7))
    assert {value.dtype for value in pruned.values()} == {torch.bfloat16}


def test_pruning_a_head_group_removes_its_weights() -> None:
    """The weights of the kept heads are slices of the original ones."""
    state, model = unpruned(num_kv_heads=4, global_heads=3)
    config = model.config
    pruned = pruned_model(state, config, Pruning.none(config).replace(1, groups=(0, 2)), torch.full((3, 32), 0.5))
    left, full = pruned.blocks[1].attention, model.blocks[1].attention
    kept = [0, 2, 3]
    D = config.head_dim
    assert torch.equal(left.norm, full.norm.view(4, D)[kept].flatten())
    assert torch.equal(left.out_proj.weight, full.out_proj.weight.view(32, 4, D)[:, kept].flatten(1))
    rows = [*kept, *(4 + head for head in kept), *(8 + head for head in kept)]
    assert torch.equal(left.qkv_proj.weight, full.qkv_proj.weight.view(12, D, 32)[rows].flatten(0, 1))
    assert pruned.config.layer_global_heads == (3, 2, 3)
    assert pruned(IDS).logits.isfinite().all()


def test_plans_follow_the_gates_and_count_the_savings() -> None:
    gates = torch.cat([torch.full((1, 32), 0.9), torch.full((1, 32), 0.1), torch.full((1, 32), 0.6)])
    gates[0, :8] = 0.7
    layers = make_plan(SMALL, gates, 0.8, 0.2, tokens=200)["layers"]
    assert [layer["keep"] for layer in layers] == ["mamba", "attention", "hybrid"]
    assert [layer["confidence"] for layer in layers] == [0.75, 1.0, 1.0]
    for layer in layers:
        left = dataclasses.replace(
            SMALL, layer_kinds=tuple(layer["keep"] if i == layer["layer"] else "hybrid" for i in range(3))
        )
        assert layer["saves"]["parameters"] == SMALL.parameter_count() - left.parameter_count()
        assert layer["saves"]["cache_bytes"] == cache_bytes(SMALL, 200) - cache_bytes(left, 200)
    assert layers[0]["saves"]["parameters"] > 0 == layers[2]["saves"]["parameters"]


def test_select_cheapest_leaves_every_layer_a_branch() -> None:
    candidates = branch_candidates(SMALL)
    order = ["mamba of layer 1", "attention of layer 1", "attention of layer 2", "mamba of layer 0"]
    costs = {name: order.index(name) if name in order else 9.0 for name in candidates}
    pruning, measured = select_cheapest(candidates, 2, SMALL, lambda name, _: costs[name])
    assert pruning.kinds == ("hybrid", "attention", "mamba")
    assert list(measured)[:4] == order
    with pytest.raises(UserError, match="cannot prune 4: every layer must keep a branch, so at most 3 can be removed"):
        select_cheapest(candidates, 4, SMALL, lambda name, _: costs[name])
    with pytest.raises(UserError, match="cannot prune 0 of this model's 6 candidates; give 1 to 6"):
        select_cheapest(candidates, 0, SMALL, lambda name, _: costs[name])
    assert list(head_candidates(SMALL)) == [f"global head group 0 of layer {layer}" for layer in range(3)]
    assert head_candidates(dataclasses.replace(SMALL, num_heads=2, num_kv_heads=1, global_heads=2)) == {}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([{"layer": 3, "keep": "mamba"}], "layer 3 is unknown; the model's layers are 0 to 2"),
        ([{"layer": "0", "keep": "mamba"}], "layer '0' is unknown"),
        ([{"layer": True, "keep": "mamba"}], "layer True is unknown"),
        ([{"layer": 0, "keep": "none"}], "layer 0: keep is 'none'; it must be mamba, attention or hybrid"),
        ([{"layer": 0}], "layer 0: keep is None; it must be mamba, attention or hybrid"),
        ([{"layer": 1, "keep": "mamba"}, {"layer": 1, "keep": "hybrid"}], "layer 1 appears twice"),
        (
            [{"layer": 1, "keep": "hybrid", "global_groups": [1]}],
            r"global_groups is \[1\]; it must list heads from 0 to 0",
        ),
        ([{"layer": 1, "keep": "hybrid", "global_groups": [0.0]}], r"global_groups is \[0.0\]"),
        ({"layer": 1}, "is not a pruning plan"),
        ([], "has no layers; create a plan with `fusiontree prune`"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused_in_one_line(layers: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": layers}))
    with pytest.raises(UserError, match=words) as caught:
        read_plan(path, SMALL)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deeply_nested_plan_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("[" * 100_000, f'{{"layers": [{{"layer": {"9" * 5000}}}]}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a pruning plan"):
            read_plan(path, SMALL)
    with pytest.raises(UserError, match="no plan at"):
        read_plan(tmp_path, SMALL)


def test_a_layer_that_was_pruned_cannot_get_its_branch_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": [{"layer": 0, "keep": "hybrid"}]}))
    with pytest.raises(UserError, match="layer 0 has only mamba, so it cannot keep hybrid"):
        read_plan(path, dataclasses.replace(SMALL, layer_kinds=("mamba", "hybrid", "hybrid")))


# --- pruned exports --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with one checkpoint whose mean gates differ by layer."""
    run, config = tmp_path_factory.mktemp("runs") / "run", dataclasses.replace(SMALL, vocab_size=512)
    found = write_run(run, config, build(vocab_size=512).state_dict(), tokenizer_folder, 0, 1)
    gates = torch.tensor([0.9, 0.5, 0.3])[:, None].expand(-1, config.hidden_size).contiguous()
    save_file({"mean": gates}, found / GATES_FILE)
    store.write_manifest(found)
    return run


def card(exported: Path) -> dict[str, str]:
    """Return the table of the model card."""
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", (exported / "README.md").read_text(), re.MULTILINE))


def test_an_edited_plan_is_exported_and_reported(run: Path, shards: Path, tmp_path: Path) -> None:
    plan, output = tmp_path / "plans" / "plan.json", tmp_path / "out"
    cli("prune", run, "--out", plan)
    edited = json.loads(plan.read_text())
    assert [layer["keep"] for layer in edited["layers"]] == ["mamba", "hybrid", "hybrid"]
    edited["layers"][2]["keep"] = "attention"
    plan.write_text(json.dumps(edited))
    cli("export", run, output, "--prune", plan, "--limit", 2, "--data", shards)
    report = json.loads((output / "fusiontree.json").read_text())["pruning"]
    model, _ = load_export(output)
    assert model.config.layer_kinds == ("mamba", "hybrid", "attention")
    assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["before"]["parameters"] > report["after"]["parameters"]
    assert report["before"]["cache_bytes"] > report["after"]["cache_bytes"]
    assert report["before"]["loss"] != report["after"]["loss"]
    assert all(report[when]["tokens_per_s"] > 0 for when in ("before", "after"))
    found = run / "checkpoints" / "step-1"
    config, weights = load_config(str(found / CONFIG_FILE)).model, store.read_weights(found)
    pruning = Pruning.none(config).replace(0, "mamba").replace(2, "attention")
    expected = pruned_model(weights, config, pruning, store.read_gates(found))
    ids = torch.arange(2, 80)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert report["before"]["weights_bytes"] > report["after"]["weights_bytes"] == 4 * report["after"]["parameters"]
    facts = card(output)
    assert facts["layers pruned to one branch"] == "0: mamba, 2: attention"
    losses = " and ".join(f"{report[when]['loss']:.4f}" for when in ("before", "after"))
    assert facts["held-out loss before and after"] == f"{losses} nats per token"
    assert "Some layers were pruned, as listed below." in (output / "README.md").read_text()
    assert "global heads left" not in facts


def test_branches_and_heads_are_pruned_by_held_out_loss(run: Path, shards: Path, tmp_path: Path) -> None:
    figures = export(run, tmp_path / "one", ExportOptions(prune="1", data=shards, limit=2))["pruning"]
    measured = figures["loss_without"]
    assert len(measured) == 6
    assert list(measured.values()) == sorted(measured.values())
    assert figures["after"]["loss"] == pytest.approx(next(iter(measured.values())))
    kinds = json.loads((tmp_path / "one" / "config.json").read_text())["layer_kinds"]
    gone, layer = next(iter(measured)).split(" of layer ")
    assert kinds[int(layer)] == {"mamba": "attention", "attention": "mamba"}[gone]
    assert kinds.count("hybrid") == 2
    (tmp_path / "again.json").write_text(json.dumps(figures["plan"]))
    config = load_config(str(run / "checkpoints" / "step-1" / CONFIG_FILE)).model
    assert list(read_plan(tmp_path / "again.json", config).kinds) == kinds
    options = ExportOptions("bf16", prune=str(tmp_path / "again.json"), data=shards, limit=1)
    again = export(run, tmp_path / "again", options)["pruning"]
    tensors = load_file(tmp_path / "again" / "model.safetensors").values()
    assert again["after"]["weights_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    figures = export(run, tmp_path / "heads", ExportOptions(prune_heads=2, data=shards, limit=2))["pruning"]
    heads = json.loads((tmp_path / "heads" / "config.json").read_text())["layer_global_heads"]
    kept = int(list(figures["loss_without"])[2].removeprefix("global head group 0 of layer "))
    assert heads == [2 if layer == kept else 0 for layer in range(3)]
    assert card(tmp_path / "heads")["global heads left"] == ", ".join(f"{i}: 0" for i in range(3) if i != kept)


def test_the_automatic_plan_and_an_unmeasurable_speed(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = {"problem": "out of memory: lower it"}
    monkeypatch.setattr(pruner, "measure_decoding", lambda *_: why)
    with open(run / "metrics.jsonl", "w") as lines:
        for step, loss in ((1, 9.0), (2, 1.0)):  # the second is later than the checkpoint
            lines.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
    report = export(run, tmp_path / "auto", ExportOptions(prune="auto", data=shards, limit=1))["pruning"]
    assert all(report[when]["problem"] == why["problem"] for when in ("before", "after"))
    assert card(tmp_path / "auto")["held-out loss in training, not pruned"] == "9.0000 nats per token"
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["layer_kinds"] == ["mamba", "hybrid", "hybrid"]


def test_a_plan_is_not_overwritten_and_a_failed_export_leaves_nothing(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    plan = tmp_path / "plan.json"
    assert main(["prune", str(run), "--out", str(plan)]) == 0
    assert "exists; name another file" in refused("prune", run, "--out", plan)
    assert "is a folder; name a file" in refused("prune", run, "--out", tmp_path, "--overwrite")
    assert "would be below" in refused("prune", run, "--out", plan / "deep" / "plan.json")
    assert "would be below" in refused("export", run, plan / "out")
    assert "hi must be above lo" in refused("prune", run, "--hi", 0.1, "--lo", 0.2)
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps({"layers": [{"layer": 0, "keep": None}]}))
    plan.write_text(json.dumps({"layers": [{"layer": 9, "keep": "mamba"}]}))
    assert "it must be mamba, attention or hybrid" in refused(
        "export", run, tmp_path / "out", "--prune", nothing, "--data", shards
    )
    for given, words in ((plan, "layer 9 is unknown"), (tmp_path / "no.json", "no plan at"), (9, "cannot prune 9")):
        assert words in refused("export", run, tmp_path / "out", "--prune", given, "--data", shards)
    assert "has no dataset to measure the pruning on" in refused("export", run, tmp_path / "out", "--prune", "auto")
    assert "--limit is 0; it must be at least 1" in refused("export", run, tmp_path / "out", "--limit", 0)
    size = "9" * 400 + "GB"
    assert "--max-shard-size is" in refused("export", run, tmp_path / "out", "--max-shard-size", size)
    assert "no plan at --3" in refused("export", run, tmp_path / "out", "--prune=--3", "--data", shards)
    both = refused("export", run, tmp_path / "out", "--prune", "1", "--prune-heads", 1, "--data", shards)
    assert "--prune and --prune-heads cannot be combined; use one" in both
    assert set(tmp_path.iterdir()) == {plan, nothing}


def test_the_bench_prunes_every_second_layer() -> None:
    assert half_pruned(dataclasses.replace(SMALL, num_layers=6)).kinds == (
        *("hybrid", "mamba", "hybrid", "attention", "hybrid", "mamba"),
    )
    kept = half_pruned(dataclasses.replace(SMALL, num_layers=4), "mamba")
    assert kept.kinds == ("hybrid", "mamba", "hybrid", "mamba")
    shape = ["model.hidden_size=32", "model.num_layers=4", "model.mlp_size=48", "model.vocab_size=96"]
    figures = bench_prune("tiny", shape, context=40, steps=2)
    assert figures["layers"] == ["hybrid", "mamba", "hybrid", "attention"]
    assert set(figures["ratios"]) == {"decode", "prefill", "memory"}
    assert figures["ratios"]["memory"] < 1
    for name in ("parameters", "weights_bytes", "cache_bytes"):
        assert figures["pruned"][name] < figures["whole"][name]


def test_the_bench_measures_a_plan(tmp_path: Path) -> None:
    shape = ["model.hidden_size=32", "model.num_layers=3", "model.mlp_size=48", "model.vocab_size=96"]
    plan = tmp_path / "plan.json"
    model = dataclasses.replace(SMALL, num_layers=3)
    plan.write_text(json.dumps(Pruning.none(model).replace(0, "attention").replace(2, "mamba").to_plan()))
    assert bench_prune("tiny", shape, context=20, steps=2, keep=str(plan))["layers"] == ["attention", "hybrid", "mamba"]
    with pytest.raises(UserError, match="no plan at"):
        bench_prune("tiny", shape, context=20, steps=2, keep="mambas")


def test_the_bench_times_the_given_number_of_prefills(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prefill of 64 long rows takes 15 seconds, so the default of five per model takes minutes."""
    shapes = []
    prefill = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, ids: shapes.append(ids.shape) or prefill(self, ids))
    shape = ["model.hidden_size=32", "model.num_layers=2", "model.mlp_size=48", "model.vocab_size=96"]
    sizes = ["--context", "20", "--steps", "1", "--prefills", "2"]
    assert main(["bench", "prune", "--preset", "tiny", *shape, *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prefills"] == 2
    assert shapes == [(1, 20)] * 6  # per model one untimed and two timed
    with pytest.raises(UserError, match="--prefills is 0; it must be at least 1"):
        bench_prune("tiny", shape, context=20, steps=1, prefills=0)
