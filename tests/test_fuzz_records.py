"""Any damage to a run's folder or to an export gives one line or a documented fallback, never a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import SMALL, build, write_run

from fusiontree import cli
from fusiontree.checkpoint import store
from fusiontree.checkpoint.tensor_files import from_safetensors
from fusiontree.config import load_config, to_yaml
from fusiontree.errors import RunError, UserError
from fusiontree.inference.loading import read_facts
from fusiontree.run import incidents, lease
from fusiontree.run.folder import LAYERS_FILE, METRICS_FILE
from fusiontree.run.records import keep_until, summarize
from fusiontree.training.resume import read_position

RECORDS = (
    *("config.yaml", "metrics.jsonl", "layers.jsonl", "incidents.jsonl", "lease.json", "attempts.json", "job.id"),
    *("checkpoints", "checkpoints/latest", "checkpoints/step-1", "logs"),
)
CHECKPOINT = ("manifest.json", "state.json", "config.yaml", "gates.safetensors", "mp_rank_00_model_states.pt")
EXPORT = ("fusiontree.json", "model.safetensors")


@pytest.fixture(scope="module")
def run(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder of a run with two checkpoints, records of every kind and an export's files."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    weights = build().state_dict()
    newest = write_run(folder, SMALL, weights, tokenizer_folder, 0, 1)
    older = newest.with_name("step-0")
    shutil.copytree(newest, older)
    state = json.loads((older / "state.json").read_text()) | {"step": 0}
    (older / "state.json").write_text(json.dumps(state))
    (older / "manifest.json").unlink()
    store.write_manifest(older)
    (folder / "config.yaml").write_text(to_yaml(load_config("tiny", ["schedule.steps=40"])))
    (folder / "checkpoints" / "latest").write_text("step-1\n")
    (folder / "logs").mkdir()
    attempt = {"job": "17", "start": 1, "step": 0, "failed_attempts": 0, "nodes": ["n1"], "time": 1.8e9}
    (folder / "attempts.json").write_text(json.dumps(attempt))
    (folder / "job.id").write_text("17\n")
    lease.take(folder)
    figures = {"loss": 3.25, "lr": 1e-3, "grad_norm": 1.5, "gate_mean": 0.5, "tokens_per_s": 10.0, "save_seconds": 0.5}
    layer = {name: [0.5, 0.25] for name in ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")}
    with open(folder / METRICS_FILE, "w") as metrics, open(folder / LAYERS_FILE, "w") as layers:
        for step in range(20):
            metrics.write(json.dumps({"step": step, "tokens": 512 * step, "val_loss": 5.0}) + "\n")
            metrics.write(json.dumps({"step": step, "tokens": 512 * step, **figures}) + "\n")
            layers.write(json.dumps({"step": step, **layer, "flop_share": {"mlp": 0.75, "scan": 0.25}}) + "\n")
            incidents.record(folder, "loss_spike", step, "loss 9.0 is high", rows=[{"shard": "a.tar", "row": 3}])
    facts = {"tokenizer_fingerprint": "f", "eos_id": 0, "seq_len": 128, "step": 1}
    (folder / "fusiontree.json").write_text(json.dumps(facts))
    from safetensors.torch import save_file

    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0) + 10}, folder / "model.safetensors")
    return folder


def mutate(draw: random.Random, path: Path) -> None:
    """Damage the file or folder at `path`."""
    kind = draw.randrange(8)
    if path.is_dir() or kind == 0:
        remove(path)
        if draw.randrange(2):
            path.write_bytes(draw.choice((b"", b"{}", b"\xff\n", b"[" * 100_000)))
        elif kind == 0:
            path.mkdir()
        return
    content = path.read_bytes()
    if kind == 1:
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif kind in (2, 3, 4):
        path.write_bytes(mutate_values(draw, content))
    elif kind == 5:
        path.write_bytes(json.dumps(draw.choice(fuzz.HOSTILE)).encode())
    else:
        path.write_bytes(fuzz.mutate_bytes(draw, content))


def mutate_values(draw: random.Random, content: bytes) -> bytes:
    """Change values in a JSON file, or in a line of a file of JSON lines; other files lose bytes."""
    lines = content.splitlines(keepends=True)
    index = draw.randrange(len(lines)) if lines else 0
    for begin, end in ((0, len(lines)), (index, index + 1)):
        try:
            values = json.loads(b"".join(lines[begin:end]))
        except ValueError:
            continue
        changed = json.dumps(fuzz.mutate_json(draw, values)).encode() + b"\n"
        return b"".join(lines[:begin]) + changed + b"".join(lines[end:])
    return fuzz.mutate_bytes(draw, content)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def each_damaged_copy(
    run: Path, folder: Path, names: tuple[str, ...], count: int, check: Callable[[random.Random, Path, str], None]
) -> None:
    """Call `check` with copies of `run` in which one of `names` is damaged, and with that name."""

    def case(draw: random.Random) -> None:
        copy = folder / "case" / "run[1]"
        shutil.copytree(run, copy)
        try:
            name = draw.choice(names)
            mutate(draw, copy / name)
            check(draw, copy, name)
        finally:
            shutil.rmtree(folder / "case")

    fuzz.run_cases(count, case)


def command(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command; check that it ends with one line of error or none, and return its output."""
    code = cli.main([*map(str, words)])
    shown = capsys.readouterr()
    assert code in (0, 1, 2)
    assert all(line.isprintable() and len(line) < fuzz.MAX_MESSAGE for line in shown.err.splitlines()), shown.err
    assert (code == 0) == ("fusiontree: error: " not in shown.err)
    return shown.out


def test_status_and_report_of_a_damaged_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(draw: random.Random, copy: Path, name: str) -> None:
        if shown := command(capsys, "status", copy, "--json"):
            assert json.loads(shown)["steps"] == 40 or name == "config.yaml"
        command(capsys, "status", copy)
        command(capsys, "report", copy)
        page = copy / "report.html"
        if page.is_file():
            data = page.read_text().partition('id="data">')[2].partition("</script>")[0]
            json.loads(data, parse_constant=pytest.fail)

    each_damaged_copy(run, tmp_path, RECORDS, 150, check)


def test_resume_from_a_damaged_run(run: Path, tmp_path: Path) -> None:
    def check(draw: random.Random, copy: Path, name: str) -> None:
        def resume() -> Path | None:
            store.restore_replaced(copy / "checkpoints")
            with ExitStack() as pins:
                found, _ = store.newest(copy / "checkpoints", pins)
                if found is not None:
                    read_position(load_config(str(found / "config.yaml")), found)
                    store.read_gates(found)
                lease.check(copy)
            for record in (METRICS_FILE, LAYERS_FILE):
                keep_until(copy / record, 10)
            summarize(copy)
            incidents.read(copy)
            return found

        found = fuzz.attempt(resume)
        if not name.startswith("checkpoints") and isinstance(found, Path):
            assert found.name == "step-1"  # damaged records do not stop a run

    each_damaged_copy(run, tmp_path, tuple(name for name in RECORDS if name != "config.yaml"), 150, check)


def test_a_damaged_checkpoint_is_never_used(run: Path, tmp_path: Path) -> None:
    names = tuple(f"checkpoints/step-1/{name}" for name in CHECKPOINT)

    def check(draw: random.Random, copy: Path, name: str) -> None:
        damaged, intact = copy / name, run / name
        found, lines = store.newest(copy / "checkpoints")
        if damaged.is_file() and damaged.read_bytes() == intact.read_bytes():
            return
        manifest = damaged.name == "manifest.json" and found is not None and found.name == "step-1"
        if manifest:  # e.g. another key: the files are still verified
            assert {file.name: store.sha256(file) for file in found.iterdir() if file != damaged}.items() >= (
                json.loads(damaged.read_text())["sha256"].items()
            )
        else:
            assert found == copy / "checkpoints" / "step-0"
            assert "is damaged and skipped" in lines[copy / "checkpoints" / "step-1"]

    each_damaged_copy(run, tmp_path, names, 100, check)


def test_a_checkpoint_from_elsewhere_with_right_hashes(run: Path, tmp_path: Path) -> None:
    names = tuple(f"checkpoints/step-1/{name}" for name in CHECKPOINT[1:])

    def check(draw: random.Random, copy: Path, name: str) -> None:
        checkpoint = copy / "checkpoints" / "step-1"
        if not (copy / name).is_file():
            return
        store.write_manifest(checkpoint)

        def read() -> None:
            with ExitStack() as pins:
                found = store.resolve(checkpoint, pins)
                config = load_config(str(found / "config.yaml"))
                store.read_state(found)
                store.read_gates(found, config.model)
                for tensor in store.read_weights(found).values():
                    assert tensor.numel() >= 0

        fuzz.attempt(read)

    each_damaged_copy(run, tmp_path, names, 100, check)


def test_a_damaged_export_gives_its_own_tensors_or_one_line(run: Path, tmp_path: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in from_safetensors(run).items()}
    header = 8 + int.from_bytes((run / "model.safetensors").read_bytes()[:8], "little")

    def check(draw: random.Random, copy: Path, name: str) -> None:
        fuzz.attempt(lambda: read_facts(copy))
        found = fuzz.attempt(lambda: dict(from_safetensors(copy).items()))
        if isinstance(found, UserError | RunError):
            return
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-(48)] + (run / "model.safetensors").read_bytes()[header:])
        shown = dict(from_safetensors(copy).items())
        assert [value.flatten().tolist() for value in shown.values()] == [
            value.flatten().tolist() for value in expected.values()
        ]

    each_damaged_copy(run, tmp_path, EXPORT, 150, check)
