"""An exported folder loads without this project and equals the trained model."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, cli, metrics, settings, write_run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import dynamic_module_utils

from fusiontree import model as model_package
from fusiontree.checkpoint import store
from fusiontree.config import load_config, preset_names
from fusiontree.errors import RunError
from fusiontree.export import parity
from fusiontree.export.exporter import export
from fusiontree.export.parity import prove
from fusiontree.files import staged_folder
from fusiontree.model.lm import HybridLM
from fusiontree.run.folder import GATES_FILE, list_checkpoints


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a few steps in one process."""
    output = tmp_path_factory.mktemp("runs")
    cli("train", "tiny", *settings(shards, output, name="run"))
    return output / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """Export the run."""
    cli("export", run, run / "export")
    return run / "export"


def trained(run: Path) -> HybridLM:
    model = HybridLM(load_config(str(run / "config.yaml")).model)
    model.load_state_dict(store.read_weights(run / "checkpoints" / "step-8"))
    return model.eval()


def test_the_folder_has_the_files_of_a_hugging_face_model(exported: Path, run: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "hf.py", "lm.py", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "README.md", "parity.json", "fusiontree.json"} <= names
    assert json.loads((exported / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "hf.FusionTreeConfig",
        "AutoModel": "hf.FusionTreeModel",
        "AutoModelForCausalLM": "hf.FusionTreeForCausalLM",
        "AutoModelForSequenceClassification": "hf.FusionTreeForSequenceClassification",
    }
    assert cli("export", "step-8", run / "other", cwd=run / "checkpoints")
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["logits"] == parity["left_padding"] == parity["packed"] == 0
    assert parity["cached_decoding"] < 1e-4


def test_the_model_card_has_the_runs_facts(exported: Path, run: Path) -> None:
    card = (exported / "README.md").read_text()
    facts = dict(re.findall(r"^\| (.+) \| (.+) \|$", card, re.MULTILINE))
    losses = [line["val_loss"] for line in metrics(run) if "val_loss" in line]
    assert facts["updates"] == "8"
    assert facts["tokens"] == f"{metrics(run)[-1]['tokens']:,}"
    assert facts["held-out loss"] == f"{losses[-1]:.4f} nats per token"
    assert facts["tokens per update"] == "1,024"
    assert f"{sum(p.numel() for p in trained(run).parameters()):,} parameters" in card


WITHOUT_US = """
import os
import re
import sys
from importlib.util import find_spec
for name in ("fusiontree", "deepspeed", "mamba_ssm", "webdataset", "gigatoken", "launcher", "data_tools", "accelerate"):
    assert find_spec(name) is None, name
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder, saved = sys.argv[1:]
torch.set_num_threads(1)
AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
stored = load_file(folder + "/model.safetensors")
state = model.state_dict()
assert torch.equal(state.pop("lm_head.weight"), state["model.embedding.weight"])  # tied
assert {*stored} == {*state} and all(torch.equal(stored[name], value) for name, value in state.items())
tokenizer.padding_side = "left"
batch = tokenizer(["tree gate", "scan window state token shard row"], return_tensors="pt", padding=True)
batch.pop("token_type_ids", None)
texts = {}
for name, options in {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 3}}.items():
    for pace, use_cache in {"": True, "slow ": False}.items():
        options["use_cache"] = use_cache
        texts[pace + name] = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
alone = tokenizer("tree gate", return_tensors="pt")["input_ids"]
texts["alone"] = model.generate(alone, max_new_tokens=12, do_sample=False)
output = model(alone, labels=alone)
halved = model(alone, labels=alone, num_items_in_batch=2 * (alone.shape[1] - 1)).loss
assert torch.allclose(2 * halved, output.loss)
output.loss.backward()
gradients = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model.gradient_checkpointing_enable()
ran = []
hooks = [block.register_forward_pre_hook(lambda block, _: ran.append(block)) for block in model.model.blocks]
model(alone, labels=alone).loss.backward()
assert ran == [*model.model.blocks, *reversed(model.model.blocks)]  # again in the backward pass
for hook in hooks:
    hook.remove()
assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(model.parameters(), gradients))
model.zero_grad()
with torch.autocast("cpu", torch.bfloat16):
    mixed = model(alone, labels=alone)
assert abs(mixed.loss - output.loss) < 0.02 and model.model.activation_dtype == torch.bfloat16
mixed.loss.backward()
for p, g in zip(model.parameters(), gradients):
    assert torch.allclose(p.grad, g, atol=0.05 * g.abs().max().item() + 1e-3)
ids = torch.arange(2, 202)[None]
with torch.no_grad():
    positions = torch.cat([torch.arange(120), torch.arange(80)])[None]
    labels = torch.cat([ids[:, :120], torch.full((1, 1), -100), ids[:, 121:]], 1)
    packed = model(ids, position_ids=positions, labels=ids)
    apart = [model(piece).logits for piece in (ids[:, :120], ids[:, 120:])]
    assert torch.allclose(packed.logits, torch.cat(apart, 1), atol=1e-5)
    assert torch.equal(packed.loss, model(ids, position_ids=positions, labels=labels).loss)
model.generate(alone, max_new_tokens=3, do_sample=False, streamer=TextStreamer(tokenizer))
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
assert {p.dtype for n, p in half.named_parameters() if n.endswith("A_log")} == {torch.float32}
assert half.model.embedding.weight.dtype == torch.bfloat16
assert half.generate(alone, max_new_tokens=3).shape[1] <= alone.shape[1] + 3
chosen = AutoConfig.from_pretrained(folder, trust_remote_code=True, kernels={"scan": "warp"})
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, config=chosen)(ids)
except ValueError as error:
    assert "kernels.scan 'warp' is unknown" in str(error)
else:
    raise AssertionError("the configuration's kernels are ignored")
torch.save({"logits": model(ids).logits.detach(), "loss": output.loss.detach(), "prompt": alone, **texts}, saved)
os.chdir(folder)
exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1], {})  # as the model card shows it
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
"""


def clean_environment(site: Path) -> dict[str, str]:
    """Return an environment in which Python sees only transformers, torch and their dependencies."""
    site.mkdir()
    wanted, found = ["torch", "transformers"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        found.add(name)
        distribution = metadata.distribution(name)
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return {**os.environ, "PYTHONPATH": str(site), "HF_HOME": str(site.parent)}


def test_it_loads_and_generates_without_this_project(exported: Path, run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    command = [sys.executable, "-S", "-c", WITHOUT_US, str(exported), str(saved)]  # -S: without site-packages
    environment = clean_environment(tmp_path / "site")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    given = torch.load(saved)
    model = trained(run)
    with torch.no_grad():
        assert torch.equal(given["logits"], model(torch.arange(2, 202)[None]).logits)
        logits = model(given["prompt"]).logits[0, :-1]
    assert given["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, given["prompt"][0, 1:]).item())
    assert torch.equal(given["greedy"], given["slow greedy"])
    assert torch.equal(given["greedy"][0, -12:], given["alone"][0, -12:])
    assert torch.equal(given["beams"], given["slow beams"])
    assert given["beams"].shape[0] == 2 * 3


def test_a_cache_is_accepted_by_both_names_and_refused_by_others(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        for name in ("past_key_values", "cache"):
            first = model(ids[:, :-1], use_cache=True)
            last = model(ids[:, -1:], **{name: first.past_key_values})
            torch.testing.assert_close(last.logits[:, -1], whole, rtol=1e-4, atol=1e-4)
            assert last.past_key_values is first.past_key_values
        with pytest.raises(TypeError, match="does not support the argument cache_params"):
            model(ids[:, -1:], cache_params=first.past_key_values)


@torch.no_grad()
def test_padding_after_a_packed_prompt_changes_no_real_token(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    ids = torch.randint(2, 90, (2, 43), generator=torch.Generator().manual_seed(0))
    packed = (torch.arange(40) % 20)[None]  # two documents; the new tokens continue the second
    cache = model(ids[:, :40], position_ids=packed, use_cache=True).past_key_values
    mask = torch.ones(2, 43, dtype=torch.int64)
    mask[1, 41:] = 0
    found = model(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits
    alone = model(ids[:, 20:]).logits[:, -3:]
    torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, 0], alone[1, 0], rtol=1e-4, atol=1e-4)


def test_a_document_longer_than_a_learned_table_is_refused(exported: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(exported, trust_remote_code=True, srte="learned", max_position_embeddings=20)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    ids = torch.arange(24).view(1, -1)
    padded = torch.arange(24).view(1, -1) >= 6
    packed = (torch.arange(24) % 12)[None]
    model(ids, position_ids=packed)
    cache = model(ids, attention_mask=padded, use_cache=True).to_tuple()[1]
    model(ids[:, :2], past_key_values=cache)
    for words in ({}, {"attention_mask": torch.ones_like(ids)}, {"attention_mask": torch.arange(24).view(1, -1) >= 3}):
        with pytest.raises(ValueError, match=r"a document has 2[14] tokens, but SRTE's learned table ends at 20"):
            model(ids, **words)
    cache = model(ids[:, :20], use_cache=True).to_tuple()[1]
    with pytest.raises(ValueError, match="a document has 21 tokens, but"):
        model(ids[:, 20:21], past_key_values=cache)


def test_all_model_files_are_copied(exported: Path) -> None:
    source = Path(model_package.__file__).parent
    # no module of the model imports flops.py, which counts operations, and triton_fp8.py, which serves training alone
    not_of_the_model = {"__init__.py", "flops.py", "triton_fp8.py"}
    assert {path.name for path in source.glob("*.py")} - not_of_the_model <= {p.name for p in exported.glob("*.py")}


def test_an_unavailable_kernel_is_not_reported_as_damage(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONTREE_SCAN", "warp")
    done = cli("generate", exported, "tree", code=2)
    assert "kernels.scan 'warp' is unknown" in done.stderr
    assert "damaged" not in done.stderr


def test_bf16_keeps_the_scan_parameters_in_fp32(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    figures = json.loads(cli("export", run, tmp_path / "half", "--dtype", "bf16", "--json").stdout)
    assert figures["dtype"] == "bf16"
    weights = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name for name, value in weights.items() if value.dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"A_log", "D", "dt_bias"}
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.bfloat16}


def test_a_tokenizer_that_is_not_the_runs_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    path.write_text(
        path.read_text()
        .replace('"truncation":null', '"truncation": 3')
        .replace('"truncation": null', '"truncation": 3')
    )
    error = cli("export", tmp_path / "run", tmp_path / "out", code=2).stderr
    assert "is not the run's tokenizer; copy the tokenizer of the training data there" in error
    path.write_text("{")
    assert "cannot be read" in cli("export", tmp_path / "run", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "name"), [({"num_layers": 4}, "blocks.3."), ({"mlp_size": 64}, "mlp")])
def test_weights_that_do_not_match_the_configuration_are_reported_and_leave_nothing(
    change: dict[str, int], name: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", dataclasses.replace(SMALL, **change), build().state_dict(), tokenizer_folder, 0, 1)
    with pytest.raises(RunError, match=rf"its weights do not match its config.yaml \(.*{name}"):
        export(tmp_path / "run", tmp_path / "new" / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_output_folder_is_removed_with_its_new_parents(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a" / "b" / "out", False, "x"):
        raise RuntimeError
    assert [*tmp_path.iterdir()] == []


def test_only_the_tokenizer_is_copied_from_its_folder(exported: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    for name in ("config.json", "hf.py", "pytorch_model.bin"):
        (tmp_path / "run" / "tokenizer" / name).write_text("raise SystemExit(7)")
    cli("export", tmp_path / "run", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in exported.iterdir()}
    for name in ("config.json", "hf.py"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes()


def test_a_damaged_checkpoint_is_reported_before_an_older_one_is_exported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / GATES_FILE).write_bytes(b"")
    stderr = cli("export", tmp_path / "run", tmp_path / "out").stderr
    assert f"checkpoint {newest} is damaged and skipped: gates.safetensors" in " ".join(stderr.split())


def test_different_weights_fail_the_proof_which_leaves_no_imported_code(exported: Path, run: Path) -> None:
    def traces() -> tuple:
        modules = {name for name in sys.modules if name.startswith("transformers_modules")}
        return dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), modules, dict(os.environ)

    weights = dict(store.read_weights(run / "checkpoints" / "step-8"))
    config = load_config(str(run / "config.yaml")).model
    before = traces()
    assert prove(exported, config, weights, "fp32")["packed"] == 0
    assert traces() == before
    weights["blocks.1.fusion.bias"] = weights["blocks.1.fusion.bias"] + 0.1
    with pytest.raises(RunError, match="export failed its parity proof: logits differs"):
        prove(exported, config, weights, "fp32")


@pytest.mark.parametrize(
    ("check", "factor"),
    [
        ("left_padding", "1 if attention_mask is None or bool(attention_mask.all()) else 1.1"),
        ("cached_decoding", "1.1 if use_cache else 1"),
        ("cached_decoding", "torch.tensor([1, 1.1])[:, None, None] if use_cache else 1"),  # in the padded row
    ],
)
def test_a_model_that_is_wrong_in_a_single_check_fails_the_proof(
    check: str, factor: str, exported: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    code, given = (tmp_path / "out" / "hf.py").read_text(), "CausalLMOutputWithPast(loss, logits, "
    assert given in code
    wrong = given.replace("logits, ", f"logits * ({factor}), ")
    (tmp_path / "out" / "hf.py").write_text(code.replace(given, wrong))
    weights = store.read_weights(run / "checkpoints" / "step-8")
    with pytest.raises(RunError, match=f"export failed its parity proof: {check} differs"):
        prove(tmp_path / "out", load_config(str(run / "config.yaml")).model, weights, "fp32")


@pytest.mark.parametrize("preset", preset_names())
def test_the_proof_covers_rows_longer_than_a_chunk_and_a_window(preset: str) -> None:
    config = load_config(preset).model
    rows = parity._rows(config)
    length = rows["logits"].ids.shape[1]
    assert length > max(config.chunk_size, config.window)
    assert (rows["packed"].documents.position_ids.max() + 1 > max(config.chunk_size, config.window)).all()
    positions = parity._compared_positions(length)
    assert len(positions) <= parity.COMPARED
    assert (positions[0], positions[-1]) == (0, length - 1)
    assert positions.diff().max() <= length // 64
    assert positions[-parity.STEPS - 1 :].tolist() == list(range(length - parity.STEPS - 1, length))
    assert parity._compared_positions(20).tolist() == list(range(20))


def test_logits_at_some_indices_equal_those_of_a_complete_forward(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    ids, positions = torch.arange(2, 62)[None], torch.tensor([0, 7, 59])
    with torch.no_grad():
        whole, some, last = (model(ids, logits_to_keep=keep).logits for keep in (0, positions, 3))
    # on some processors a matrix product with fewer rows rounds differently
    torch.testing.assert_close(some, whole[:, positions], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_generate_is_reproducible_and_streams_the_returned_text(exported: Path) -> None:
    options = ["--max-new-tokens", 24, "--temperature", 0.9, "--top-p", 0.95, "--seed", 4]
    figures = json.loads(cli("generate", exported, "tree gate", *options, "--json").stdout)
    assert figures["new_tokens"] <= 24
    assert figures["text"]
    assert figures["text"] in cli("generate", exported, "tree gate", *options).stdout
    other = json.loads(cli("generate", exported, "tree gate", *options[:-1], 5, "--json").stdout)
    assert other["text"] != figures["text"]


def test_perplexity_equals_the_validation_loss_of_training(exported: Path, run: Path, shards: Path) -> None:
    options = ["--tasks", "perplexity", "--data", shards, "--limit", 6, "--json"]
    figures = json.loads(cli("eval", exported, *options).stdout)["perplexity"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert figures["loss"] == pytest.approx(last, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(2.718281828**last, rel=1e-4)
    assert figures["seq_len"] == 128
