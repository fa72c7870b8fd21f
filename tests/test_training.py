"""Training with real ranks equals a plain loop at any number of ranks, and a resume continues it exactly."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import ranks
import torch
from conftest import Hostile, cli, metrics, settings

from fusiontree.checkpoint import store
from fusiontree.config import RunConfig, load_config
from fusiontree.data.batch import IGNORE, Batch
from fusiontree.data.format import Dataset
from fusiontree.data.stream import TrainStream, validation_batches
from fusiontree.model.documents import to_device
from fusiontree.model.flops import update_flops
from fusiontree.model.lm import HybridLM, materialize, seeded_init
from fusiontree.run import incidents
from fusiontree.run.datasets import make_recipe, open_data, open_stream, open_training
from fusiontree.run.folder import INCIDENTS_FILE, list_checkpoints
from fusiontree.training.optimizer import parameter_groups
from fusiontree.training.schedule import learning_rate


@pytest.fixture(scope="module")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run: 2 ranks, ZeRO-2, 2 accumulation steps, clipping, activation checkpointing."""
    output = tmp_path_factory.mktemp("runs")
    cli("launch", "tiny", "--local", 2, *settings(shards, output, name="two"))
    return output / "two"


def losses(run: Path) -> list[float]:
    """Return the training loss of every update."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def plain_losses(
    config: RunConfig,
    inspect: Callable[[HybridLM, Batch], None] | None = None,
    skipped: Sequence[tuple[int, int]] = (),
) -> tuple[list[float], list[float], float]:
    """Train the same run without DeepSpeed, accumulation or ranks.

    Args:
        config: the run.
        inspect: called with the model, whose gradients are set, and the batch before each update.
        skipped: ranges of rows to skip.

    Returns:
        Losses, gradient norms and the last validation loss.
    """
    data = open_data(config)
    stream = TrainStream(data.train, make_recipe(config), config.batch.tokens // config.data.seq_len)
    stream.skip_ranges(skipped)
    with torch.device("meta"):
        model = HybridLM(config.model)
    list(materialize(model, seeded_init(config.seed), torch.device("cpu")))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer), betas=(config.optimizer.beta1, config.optimizer.beta2)
    )
    curve, norms = [], []
    for step in range(config.schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step)
        (batch,) = next(stream)
        ids, labels, documents = to_device(batch, "cpu")
        loss = torch.nn.functional.cross_entropy(model(ids, documents).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        if inspect is not None:
            inspect(model, batch)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert data.validation is not None
    with torch.no_grad():
        total = tokens = 0.0
        for batch in validation_batches(data.validation, config.data.seq_len, 1, 0, 1, config.validation.rows):
            ids, labels, documents = to_device(batch, "cpu")
            total += model(ids, documents, labels=labels).loss_sum.item()
            tokens += batch.real_tokens
    return curve, norms, total / tokens


def test_two_ranks_match_a_plain_loop(two_ranks: Path) -> None:
    expected, norms, last_validation = plain_losses(load_config(str(two_ranks / "config.yaml")))
    assert losses(two_ranks) == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in metrics(two_ranks) if "loss" in line] == pytest.approx(norms, rel=1e-4)
    validation = [line["val_loss"] for line in metrics(two_ranks) if "val_loss" in line]
    assert validation[-1] == pytest.approx(last_validation, rel=1e-5)
    assert validation[-1] < validation[0] - 0.5


@pytest.fixture(scope="module", params=["zero0", "zero1", "zero3", "zero3_offload"])
def other_stage(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the run of `two_ranks` at another ZeRO stage."""
    output = tmp_path_factory.mktemp("runs")
    ranks.run(["train", "tiny", *settings(shards, output, name="other", deepspeed=request.param)], output, 2)
    return output / "other"


def test_other_zero_stages_match_the_same_curve(two_ranks: Path, other_stage: Path) -> None:
    assert losses(other_stage) == pytest.approx(losses(two_ranks), rel=1e-5)
    weights = store.read_weights(other_stage / "checkpoints" / "step-8")
    reference = store.read_weights(two_ranks / "checkpoints" / "step-8")
    assert set(weights) == set(reference)
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_a_resume_at_every_stage_is_bitwise_exact(other_stage: Path, shards: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(other_stage, tmp_path)
    stage = load_config(str(other_stage / "config.yaml")).deepspeed
    ranks.run(["train", "tiny", *settings(shards, tmp_path, name="other", deepspeed=stage)], tmp_path, 2)
    assert metrics(resumed) == metrics(other_stage)
    before, after = (store.read_weights(run / "checkpoints" / "step-8") for run in (other_stage, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


def layer_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]


def layer_truth(model: HybridLM, batch: Batch) -> dict[str, list]:
    """Return the expected layer figures of a model with gradients, from its branches' outputs."""
    ids, labels, documents = to_device(batch, "cpu")
    real, outputs = labels != IGNORE, {}
    branches = [(name, block, getattr(block, name)) for block in model.blocks for name in ("mamba", "attention")]
    for name, block, branch in branches:
        branch.forward = lambda *args, key=(name, block), run=branch.forward: outputs.setdefault(key, run(*args))
    with torch.no_grad():
        gates = model(ids, documents, labels=labels).gates
    for *_, branch in branches:
        del branch.forward
    gradients = {name: p.grad.norm() ** 2 for name, p in model.named_parameters()}
    by_layer = [[g for name, g in gradients.items() if name.startswith(f"blocks.{i}.")] for i in range(len(gates))]
    other = [g for name, g in gradients.items() if not name.startswith("blocks.")]
    return {
        "gate_mean": gates.mean(1).tolist(),
        "gate_std": gates.std(1, correction=0).tolist(),
        "gate_histogram": [torch.histc(layer, 20, 0, 1).tolist() for layer in gates],
        **{
            f"{name}_rms": [outputs[name, block][real].square().mean().sqrt().item() for block in model.blocks]
            for name in ("mamba", "attention")
        },
        "grad_norm": [sum(layer).sqrt().item() for layer in by_layer],
        "other_grad_norm": [sum(other).sqrt().item()],
    }


def test_layer_figures_match_a_plain_loop(two_ranks: Path) -> None:
    truths: list[dict] = []
    plain_losses(load_config(str(two_ranks / "config.yaml")), lambda *state: truths.append(layer_truth(*state)))
    lines = layer_lines(two_ranks)
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        expected = truths[line["step"] - 1]
        assert set(line) == {"step", "flop_share", *expected}
        for name in set(expected) - {"gate_histogram"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-3), name
        assert line["gate_histogram"] == expected["gate_histogram"]
        assert sum(line["flop_share"].values()) == pytest.approx(1, abs=1e-4)
    assert truths[0]["gate_std"] == [0, 0]
    assert min(lines[1]["gate_std"]) > 1e-4


def test_layer_gradient_norms_add_up_to_the_global_norm_at_every_stage(two_ranks: Path, other_stage: Path) -> None:
    for line in layer_lines(other_stage):
        (update,) = [u for u in metrics(other_stage) if "loss" in u and u["step"] == line["step"]]
        square = sum(norm**2 for norm in [*line["grad_norm"], *line["other_grad_norm"]])
        assert math.sqrt(square) == pytest.approx(update["grad_norm"], rel=1e-4)
    for ours, theirs in zip(layer_lines(other_stage), layer_lines(two_ranks), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["mamba_rms"] == pytest.approx(theirs["mamba_rms"], rel=1e-3)


def test_metrics_have_their_documented_keys_and_values(two_ranks: Path) -> None:
    lines = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    for line in training:
        assert line.keys() - {"save_seconds"} == {  # in the line after a checkpoint
            *("step", "tokens", "loss", "perplexity", "lr", "grad_norm", "gate_mean"),
            *("tokens_per_s", "tflop_per_s", "memory_gib"),
        }  # no MFU: a CPU has no known peak
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert 0.1 < line["memory_gib"] < 8
        assert line["tokens"] == line["step"] * 1024
        assert 0 < line["gate_mean"] < 1
    stream = open_stream(config := load_config(str(two_ranks / "config.yaml")), open_training(config))
    for line, batches in zip(training, stream, strict=False):
        flops = update_flops(config.model, [length for batch in batches for length in batch.lengths])
        updates_per_s = line["tokens_per_s"] / 1024
        assert line["tflop_per_s"] * 2 == pytest.approx(sum(flops.values()) * updates_per_s / 1e12)  # on two devices
    assert [line["lr"] for line in training[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert training[-1]["lr"] == pytest.approx(3e-4)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8]


def test_the_run_folder_has_its_documented_files(two_ranks: Path) -> None:
    assert {path.name for path in two_ranks.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "layers.jsonl",
        "checkpoints",
        "logs",
        "tokenizer",
        "lease.json",
    }
    assert [path.name for path in list_checkpoints(two_ranks / "checkpoints")] == ["step-4", "step-8"]
    assert (two_ranks / "checkpoints" / "latest").read_text() == "step-8\n"
    assert {path.name for path in (two_ranks / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}


@pytest.fixture(scope="module")
def mixed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a mixture with a damaged source, a curriculum, changing weights and a reached epoch cap."""
    words = [word for word in settings(shards, tmp_path_factory.mktemp("mixed")) if not word.startswith("data.path")]
    second = shards.parent / "second"
    shutil.copytree(shards, second)
    words = [
        *(*words, "name=mixed", f"data.sources.a.path={shards}", f"data.sources.b.path={second}"),
        *("data.sources.b.max_epochs=0.3", "data.weights={4: {a: 3}}", "data.curriculum={0: 32, 3: 64, 5: 128}"),
    ]
    config = load_config("tiny", words)
    (first, *_) = [p for batch in open_stream(config, open_training(config)).places(0) for p in batch if p.source == 1]
    shard, row = Dataset(second).place(first.row)
    with open(shard.path, "r+b") as stream:
        stream.seek(int(shard.index["tokens"][row]))
        stream.write(b"\xff\xff")
    return words


@torch.no_grad()
def loss_by_source(run: Path) -> dict[str, float]:
    """Compute the held-out loss of each source with the run's last weights, one row at a time."""
    config = load_config(str(run / "config.yaml"))
    model = HybridLM(config.model)
    model.load_state_dict(store.read_weights(run / "checkpoints" / "step-8"))
    held_out = open_data(config).validation
    assert held_out is not None
    sums = {name: [0.0, 0] for name in held_out.names}
    for batch in validation_batches(held_out, config.data.seq_len, 1, 0, 1, config.validation.rows):
        ids, labels, documents = to_device(batch, "cpu")
        name = held_out.names[batch.sources[0]]
        sums[name][0] += model(ids, documents, labels=labels).loss_sum.item()
        sums[name][1] += batch.real_tokens
    return {f"val_loss/{name}": loss / tokens for name, (loss, tokens) in sums.items()}


def test_a_curriculum_over_two_sources_matches_a_plain_loop_and_resumes_exactly(mixed: list[str]) -> None:
    run = load_config("tiny", mixed).run_dir
    cli("train", "tiny", *mixed)
    complete = metrics(run)
    expected, norms, last_validation = plain_losses(load_config(str(run / "config.yaml")))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in complete if "loss" in line] == pytest.approx(norms, rel=1e-4)
    validation = [line for line in complete if "val_loss" in line]
    assert validation[-1]["val_loss"] == pytest.approx(last_validation, rel=1e-5)
    assert {key: value for key, value in validation[-1].items() if "/" in key} == pytest.approx(loss_by_source(run))
    assert {line["tokens"] // line["step"] for line in complete if "loss" in line} == {1024}
    assert store.read_state(run / "checkpoints" / "step-4")["rows_consumed"] == 4 * 1024 // 128
    bad_rows = store.read_state(run / "checkpoints" / "step-8")["bad_rows"]
    assert [entry["source"] for entry in bad_rows] == ["b"]
    shutil.rmtree(run / "checkpoints" / "step-8")
    (run / "checkpoints" / "latest").write_text("step-4\n")
    cli("train", "tiny", *mixed, "data.workers=0")
    assert metrics(run) == complete
    assert store.read_state(run / "checkpoints" / "step-8")["bad_rows"] == bad_rows
    done = cli("train", "tiny", *mixed, "data.weights.4.a=2", code=2)
    assert "other values of data.weights.4.a;" in done.stderr


def interrupted_copy(run: Path, output: Path) -> Path:
    """Copy a run in the state of an interruption a few steps after its first checkpoint."""
    copy = output / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-8")
    (copy / "checkpoints" / "latest").write_text("step-4\n")
    (copy / INCIDENTS_FILE).unlink(missing_ok=True)  # of other tests
    return copy


def test_shared_memory_is_empty_afterwards(two_ranks: Path) -> None:
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer*"))


def test_a_resume_is_bitwise_exact(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(two_ranks, tmp_path)
    said = ranks.run(["train", "tiny", *settings(shards, tmp_path, name="two")], tmp_path, 2)
    assert "from step 4" in said
    assert metrics(resumed) == metrics(two_ranks)
    before, after = (store.read_weights(run / "checkpoints" / "step-8") for run in (two_ranks, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(*(store.read_gates(run / "checkpoints" / "step-8") for run in (two_ranks, resumed)))


def test_damaged_checkpoints_and_records_are_reported_and_skipped(
    two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "two"
    shutil.copytree(two_ranks, copy)
    victim = next((copy / "checkpoints" / "step-8").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    records = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(b"\xfb" + records[1:])  # one flipped bit in the first line
    (copy / "lease.json").write_text("")
    (copy / "checkpoints" / "latest").write_text("garbage")
    said = ranks.run(["train", "tiny", *settings(shards, tmp_path, name="two")], tmp_path, 2)
    assert "step-8 is damaged and skipped" in said
    assert "metrics.jsonl: a damaged line is skipped (line 1: it is not JSON)" in said
    assert [(line["kind"], line["step"]) for line in incidents.read(copy)] == [("fallback", 8), ("resume", 4)]
    assert metrics(copy) == metrics(two_ranks)[1:]


def test_a_checkpoint_that_could_run_code_is_refused_in_one_line_unless_trusted(
    two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    copy, mark = tmp_path / "two", tmp_path / "mark"
    shutil.copytree(two_ranks, copy)
    victim = next((copy / "checkpoints" / "step-8").glob("zero_pp_rank_1*"))
    torch.save({**torch.load(victim, weights_only=False), "more": Hostile(mark)}, victim)
    store.write_manifest(victim.parent)
    words = ["tiny", *settings(shards, tmp_path, name="two")]
    said = cli("launch", "--local", 2, *words, code=2).stderr
    (line,) = [line for line in said.splitlines() if "--trust-checkpoint" in line]
    assert f"{victim} contains more than tensors (os.makedirs)" in line
    assert not mark.exists()
    ranks.run(["train", "--trust-checkpoint", *words], tmp_path, 2)  # loaded by DeepSpeed
    mark.rmdir()
    ranks.run(["train", "--trust-checkpoint", *words], tmp_path)  # copied piece by piece
    mark.rmdir()


def test_a_finished_run_is_unchanged(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    before = (two_ranks / "metrics.jsonl").read_text()
    said = ranks.run(["train", "tiny", *settings(shards, two_ranks.parent, name="two")], tmp_path, 2)
    assert re.search(r"^steps +8$", said, re.MULTILINE)
    assert (two_ranks / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__lr": 1e-3}, "optimizer.lr"),
        ({"model__window": 16}, "model.window"),
        ({"seed": 1, "schedule__steps": 9}, "schedule.steps"),  # seed is allowed
    ],
)
def test_a_resume_with_other_values_is_refused_by_key(
    changes: dict, words: str, two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    argv = ["train", "tiny", "--allow-changed", "seed", *settings(shards, two_ranks.parent, name="two", **changes)]
    assert f"other values of {words};" in ranks.run(argv, tmp_path, 2, code=2)
    assert load_config(str(two_ranks / "config.yaml")).optimizer.lr == 3e-3


def test_an_allowed_change_is_recorded(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(two_ranks, tmp_path)
    words = ["--allow-changed", "optimizer.lr", *settings(shards, tmp_path, name="two", optimizer__lr=1e-3)]
    said = ranks.run(["train", "tiny", *words], tmp_path, 2)
    assert "resuming with other values of optimizer.lr, as --allow-changed permits" in said
    assert [line["kind"] for line in incidents.read(resumed)] == ["changed", "resume"]
    schedule = load_config(str(resumed / "config.yaml")).schedule
    expected = [learning_rate(schedule, 3e-3, 3), learning_rate(schedule, 1e-3, 4)]
    assert [line["lr"] for line in metrics(resumed) if "lr" in line][3:5] == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__mlp_size": 98}, "step-8 do not fit other values of model.mlp_size;"),
        ({"batch__tokens": 1536}, "was saved after 8192 tokens, inside a batch of batch.tokens 1536;"),
    ],
)
def test_an_impossible_change_is_refused_even_if_allowed(
    changes: dict, words: str, two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    (key,) = changes
    setting = settings(shards, two_ranks.parent, name="two", batch__micro_rows=1, **changes)
    said = ranks.run(["train", "tiny", f"--allow-changed={key.replace('__', '.')}", *setting], tmp_path, code=2)
    assert words in said


def test_an_unknown_key_cannot_be_allowed(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    for key in ("lr", "data.weight", "losses.gate_balances.0"):
        words = ["train", "tiny", "--allow-changed", key, *settings(shards, two_ranks.parent, name="two")]
        assert f"--allow-changed {key} is unknown" in ranks.run(words, tmp_path, code=2)


@pytest.mark.parametrize("allowed", ["losses.gate_balance.0", "losses.gate_balance"])
def test_a_table_entry_is_allowed_by_its_key_or_the_tables(
    allowed: str, two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    resumed = interrupted_copy(two_ranks, tmp_path)
    words = ["train", "tiny", *settings(shards, tmp_path, name="two", losses__gate_balance=0.1)]
    assert "--allow-changed losses.gate_balance.0\n" in ranks.run(words, tmp_path, code=2)
    ranks.run([*words, "--allow-changed", allowed], tmp_path)
    assert incidents.read(resumed)[0]["keys"] == ["losses.gate_balance.0"]


def test_tokens_continue_from_the_checkpoint_with_another_batch_size(
    two_ranks: Path, shards: Path, tmp_path: Path
) -> None:
    resumed = interrupted_copy(two_ranks, tmp_path)
    words = ["--allow-changed", "batch.tokens", *settings(shards, tmp_path, name="two", batch__tokens=2048)]
    ranks.run(["train", "tiny", *words], tmp_path)
    tokens = {line["step"]: line["tokens"] for line in metrics(resumed)}
    assert [tokens[step] for step in range(3, 9)] == [3072, 4096, 6144, 8192, 10240, 12288]
    assert store.read_state(resumed / "checkpoints" / "step-8")["tokens"] == 12288


def test_keys_that_do_not_affect_the_mathematics_may_change(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(two_ranks, tmp_path)
    free = {"batch__micro_rows": 4, "activation_checkpointing": "none", "logging__every": 2}
    ranks.run(["train", "tiny", *settings(shards, tmp_path, name="two", **free)], tmp_path, 2)
    assert losses(resumed)[-1] == pytest.approx(losses(two_ranks)[-1], rel=1e-5)


def test_a_run_that_died_before_its_first_checkpoint_restarts_its_metrics(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").touch()
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "val_loss": 1.0}\n{"step": 1, "lo')
    cli("train", "tiny", *settings(shards, tmp_path, name="r", schedule__steps=3))
    assert [line["step"] for line in metrics(tmp_path / "r")] == [0, 1, 2, 3, 3]
    assert metrics(tmp_path / "r")[0]["val_loss"] > 5


def test_parameters_stay_fp32_in_bf16_and_the_loss_is_close(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    cli("train", "tiny", *settings(shards, tmp_path, name="half", precision="bf16"))
    weights = store.read_weights(tmp_path / "half" / "checkpoints" / "step-8")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert losses(tmp_path / "half") != losses(two_ranks)
    assert losses(tmp_path / "half") == pytest.approx(losses(two_ranks), rel=0.02)


def test_wandb_is_offline_without_a_key_and_keeps_its_id(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = ["train", "tiny", *settings(shards, tmp_path, name="w", logging__wandb="true", validation__every=0)]
    cli(*words)
    saved = list_checkpoints(tmp_path / "w" / "checkpoints")
    ids = {store.read_state(path)["wandb_id"] for path in saved}
    assert len(saved) == 2
    (run_id,) = ids
    shutil.rmtree(saved[-1])
    cli(*words)  # resumes
    starts = [path.name for path in (tmp_path / "w" / "wandb").glob("offline-run-*")]
    assert len(starts) == 2
    assert all(name.endswith(run_id) for name in starts)


def test_wandb_without_its_server_continues_offline_under_the_same_id(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    words = ["train", "tiny", *settings(shards, tmp_path, name="w", logging__wandb="true", validation__every=0)]
    done = cli(*words)
    lines = [line for line in done.stderr.splitlines() if "wandb" in line]
    assert len(lines) == 1
    assert lines[0].startswith("wandb: CommError: ")
    assert lines[0].endswith(f"; recording offline in {tmp_path / 'w' / 'wandb'}, for `wandb sync`")
    (record,) = (tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb")
    (run_id,) = {store.read_state(path)["wandb_id"] for path in list_checkpoints(tmp_path / "w" / "checkpoints")}
    assert record.name == f"run-{run_id}.wandb"
    assert b"grad_norm" in record.read_bytes()
