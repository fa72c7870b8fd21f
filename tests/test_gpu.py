"""Training on GPUs: every engine, overlapping copies, resume, and export of the trained model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_zero
import torch
from conftest import NO_ASYNC_IO, cli, has_async_io, metrics, settings

from fusiontree.config import load_config
from fusiontree.distributed.ports import free_port
from fusiontree.model.kernel_registry import OPERATIONS
from fusiontree.run import incidents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPE = {
    **test_zero.SHAPE,
    "hidden_size": 64,
    "head_dim": 64,
    "ssm_head_dim": 32,
    "ssm_state_size": 32,
    "chunk_size": 32,
}
PLAIN = [f"kernels.{op}=reference" for op in OPERATIONS]
RECOMPUTED = "activation_checkpointing={policy: full, offload: true}"
JOBS = {  # by name: overrides, and relative tolerance of the losses to the plain loop's
    "zero0": (PLAIN, 1e-4),
    "zero1": ([*PLAIN, RECOMPUTED], 1e-4),
    "zero2": ([*PLAIN, "activation_checkpointing=branch"], 1e-4),
    "zero3": ([*PLAIN, RECOMPUTED], 1e-4),
    "zero3_offload": ([*PLAIN, "activation_checkpointing=every_n"], 1e-4),
    "zero3 muon": ([*PLAIN, *test_zero.MUON], 1e-3),  # its iterations are in bf16, and a CPU sums in another order
    "zero3_nvme wide": ([*PLAIN, *test_zero.WIDE], 1e-4),
    "zero1 kernels": (["precision=bf16", RECOMPUTED], 2e-2),
}


def curves(folder: Path) -> None:
    """Train with each engine on this rank's share of the same rows, and save the curves."""
    from fusiontree.distributed import collectives

    world = collectives.start()
    found = {}
    for name, (overrides, _) in JOBS.items():
        if test_zero.skipped(name):
            continue
        config = test_zero.config_of(
            folder, [f"deepspeed={name.split()[0]}", f"batch.micro_rows={4 // world.size}", *overrides], SHAPE
        )
        found[name] = test_zero.curve_of(config, world)
    if world.is_main:
        (folder / f"curves-{world.size}.json").write_text(json.dumps(found))
    collectives.leave()


def in_a_process(code: str, *arguments: object, ends: int = 0, ranks: int = 1) -> None:
    """Run a program on `ranks` GPUs and check its exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=500)[0][-4000:] for process in processes]
    assert [process.returncode for process in processes] == [ends] * ranks, "\n".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a teacher."""
    folder = tmp_path_factory.mktemp("gpu")
    test_zero.write_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the curves of one or two ranks, one per GPU."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    code = "import sys, pathlib, test_gpu; test_gpu.curves(pathlib.Path(sys.argv[1]))"
    in_a_process(code, folder, ranks=request.param)
    return json.loads((folder / f"curves-{request.param}.json").read_text())


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the plain loop's curves on a CPU, by optimizer."""
    from fusiontree.inference.loading import load_export

    teacher, _ = load_export(folder / "teacher", torch.device("cpu"))
    with torch.compiler.set_stance("force_eager"):  # compiling Muon for a CPU takes minutes
        return {
            kind: test_zero.plain_curve(test_zero.config_of(folder, more, SHAPE), teacher)
            for kind, more in test_zero.KINDS.items()
        }


@pytest.mark.parametrize("name", JOBS)
def test_the_curve_matches_the_plain_loop(name: str, found: dict, truths: dict) -> None:
    if test_zero.skipped(name):
        pytest.skip(NO_ASYNC_IO)
    expected = truths[next((kind for kind in test_zero.KINDS if kind in name), "adamw")]
    tolerance = JOBS[name][1]
    assert set(found[name]) == set(expected)
    for figure in ("loss", "z_loss", "distill_loss", "gate_penalty"):
        assert found[name][figure] == pytest.approx(expected[figure], rel=tolerance, abs=1e-4), figure
    if "muon" not in name:  # Muon's norm is that of its update
        assert found[name]["norm"] == pytest.approx(expected["norm"], rel=10 * tolerance)


TRAIN = """
import sys
from functools import partial
import test_health
from fusiontree.cli import main
stop_before = int(sys.argv[1]) or None
test_health.poison(0, (2,), stop_before)
sys.exit(main(sys.argv[2:]))
"""
RUN = {
    "model__hidden_size": 128,
    "model__head_dim": 64,
    "model__ssm_head_dim": 32,
    "model__ssm_state_size": 32,
    "model__chunk_size": 32,
    "batch__micro_rows": 4,
    "precision": "bf16",
}


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two runs that skip one update; stop the second before update 6 and resume it."""
    output = tmp_path_factory.mktemp("runs")
    words = ["train", "tiny", *settings(shards, output, **RUN)]
    in_a_process(TRAIN, 0, *words, "name=uninterrupted")
    in_a_process(TRAIN, 6, *words, "name=stopped", ends=75)
    in_a_process(TRAIN, 0, *words, "name=stopped")
    return output


def test_a_stopped_and_resumed_run_matches_an_uninterrupted_one(runs: Path) -> None:
    uninterrupted, stopped = metrics(runs / "uninterrupted"), metrics(runs / "stopped")
    assert (
        [line["step"] for line in uninterrupted] == [line["step"] for line in stopped] == [0, 1, 2, 4, 4, 5, 6, 7, 8, 8]
    )
    for a, b in zip(uninterrupted, stopped, strict=True):
        # kernels with nondeterministic sums change the last bits
        assert {k: v for k, v in a.items() if v is not None} == pytest.approx(b, rel=2e-3)
    assert [line["kind"] for line in incidents.read(runs / "stopped")] == ["skipped_update", "signal", "resume"]


@pytest.mark.skipif(not has_async_io(), reason=NO_ASYNC_IO)
def test_states_on_nvme_are_saved_and_restored(shards: Path, tmp_path: Path) -> None:
    small = {"model__mlp_size": 6000, "checkpoint__every": 1, "checkpoint__keep_last": 9, "schedule__steps": 6}
    plain = {"kernels": dict.fromkeys(OPERATIONS, "reference"), "deepspeed": "zero3_nvme", "validation__every": 0}

    def train(name: str, stop_before: int = 0, ends: int = 0) -> None:
        words = ["train", "tiny", *settings(shards, tmp_path, nvme_path=tmp_path / name, **small | plain)]
        in_a_process(TRAIN, stop_before, *words, f"name={name}", ends=ends)
        shutil.rmtree(tmp_path / name / "zero_stage_3")  # the next job runs on another disk

    train("uninterrupted")
    train("stopped", 5, ends=75)
    train("stopped")
    uninterrupted, stopped = metrics(tmp_path / "uninterrupted"), metrics(tmp_path / "stopped")
    assert [line["loss"] for line in stopped] == pytest.approx([line["loss"] for line in uninterrupted], rel=1e-4)
    assert [line["kind"] for line in incidents.read(tmp_path / "stopped")] == ["skipped_update", "signal", "resume"]


def test_the_exported_model_has_the_same_outputs_on_both_devices(runs: Path) -> None:
    from transformers import AutoModelForCausalLM

    cli("export", runs / "stopped", runs / "export")
    model = AutoModelForCausalLM.from_pretrained(runs / "export", trust_remote_code=True).eval()
    ids = torch.randint(500, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, tokens = model(ids).logits, model.generate(ids[:, :40], max_new_tokens=8, do_sample=False)
        model.cuda()
        there = model(ids.cuda()).logits.cpu()
        again = model.generate(ids[:, :40].cuda(), max_new_tokens=8, do_sample=False).cpu()
    assert (there - here).norm() < 2e-3 * here.norm()
    assert again.tolist() == tokens.tolist()
    assert load_config(str(runs / "stopped" / "config.yaml")).precision == "bf16"
