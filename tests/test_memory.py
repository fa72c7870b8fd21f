"""The doctor's estimates of memory and disk, compared with measurements, and its comparison of nodes."""

import json
import shutil
from collections import namedtuple

import pytest
from conftest import write_manifest

from fusiontree.cli import main
from fusiontree.config import load_config
from fusiontree.doctor import diagnose, memory
from fusiontree.doctor.probe import compare
from fusiontree.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "measured"),  # peak GiB on one H200, docs/performance.md and docs/training.md
    [
        (["activation_checkpointing=none"], 103.5),
        (["activation_checkpointing=none", "deepspeed=zero0"], 96.5),
        (["activation_checkpointing=full"], 33.4),
        (["activation_checkpointing={policy: full, offload: true}"], 33.4),
        (["activation_checkpointing={policy: every_n, every: 2}"], 65.4),
        (["activation_checkpointing={policy: branch, branch: mamba}"], 76.4),
        (["activation_checkpointing={policy: branch, branch: attention}"], 89.6),
        (["activation_checkpointing={policy: branch, branch: both}"], 62.5),
        (["activation_checkpointing=full", "data.seq_len=131072"], 53.4),
        (["activation_checkpointing=full", "data.seq_len=262144"], 83.3),
    ],
)
def test_the_estimate_for_1b_is_within_15_percent_of_an_h200(overrides, measured):
    found = memory.estimate(load_config("1b", overrides), 1)
    assert found["memory_per_rank_bytes"] / 2**30 == pytest.approx(measured, rel=0.15)


def test_the_table_includes_the_estimate_of_the_chosen_settings(tmp_path):
    config = load_config("1b", ["deepspeed=zero2"])
    table = memory.table(config, 8)
    assert set(table) == {"zero0", "zero1", "zero2", "zero3"}
    chosen = memory.estimate(config, 8)["memory_per_rank_bytes"] / 2**30
    assert table["zero2"]["full"] == pytest.approx(chosen, abs=0.06)
    assert table["zero3"]["full"] < table["zero2"]["full"] < table["zero1"]["full"] < table["zero0"]["none"]


def test_partial_policies_need_more_than_full_and_less_than_none():
    def peak(*overrides: str) -> int:
        return memory.activation_bytes(load_config("1b", [f"activation_checkpointing.{o}" for o in overrides]))

    none, full = peak("policy=none"), peak("policy=full")
    half, branch = peak("policy=every_n", "every=2"), peak("policy=branch", "branch=mamba")
    assert full < half < none
    assert full < branch < none
    assert peak("policy=full", "offload=true") < full


def test_the_size_of_a_checkpoint_matches_a_real_one(shards, tmp_path):
    from conftest import cli, settings

    words = settings(shards, tmp_path, name="run", schedule__steps=1, schedule__warmup_steps=0, validation__every=0)
    cli("train", "tiny", *words)
    real = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-1").iterdir())
    assert memory.checkpoint_bytes(load_config("tiny", words)) == pytest.approx(real, rel=0.05)


def test_a_disk_too_small_for_the_checkpoints_is_a_problem(tmp_path, monkeypatch):
    config = load_config("1b", [f"output={tmp_path}/deep/er", "checkpoint.keep_last=3"])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**40))
    diagnose._check_disk(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(50 * 2**30))
    line = r"checkpoints take up to 84\.\d GiB \(21\.\d GiB each\), .* has 50\.0 GiB free"
    with pytest.raises(UserError, match=line):
        diagnose._check_disk(config)


# --- comparison of a cluster's nodes ---------------------------------------------------------------------------------


def rank_on(host: str, address: str = "10.0.0.1", **changes: object) -> dict:
    versions = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    return {
        "host": host, "address": address, "interfaces": ["eth0"], "versions": versions, "nccl": None, "gpu": None,
    } | changes  # fmt: skip


def test_equal_nodes_are_no_problem():
    found = compare({"ranks": [rank_on("a"), rank_on("a"), rank_on("b", "10.0.0.2")], "all_reduce": {}})
    assert found["problems"] == []
    assert (found["ranks"], found["hosts"]) == (3, {"a": "10.0.0.1 (eth0)", "b": "10.0.0.2 (eth0)"})


def test_nodes_that_differ_or_are_unreachable_are_named():
    other = rank_on("b", "127.0.1.1", versions={"torch": "2.12.0", "deepspeed": None}, gpu="A100")
    problems = compare({"ranks": [rank_on("a"), other], "all_reduce": {}})["problems"]
    assert [problem.split(";")[0] for problem in problems] == [
        "torch is 2.12.0 on b, 2.13.0 on a",
        "deepspeed is None on b, 0.19.8 on a",
        "gpu is A100 on b, None on a",
        "host b resolves its own name to 127.0.1.1, which other hosts cannot reach",
    ]


def test_the_memory_of_the_nodes_is_checked(tmp_path):
    """The memory of the machine that launches the job is not checked."""
    report = diagnose.diagnose(load_config("13b", [f"output={tmp_path}"]), 8, 2)
    assert not [problem for problem in report["problems"] if "GiB available" in problem]
    gpu = {"gpu": "H200", "gpu_memory_bytes": 141 * 10**9, "memory_bytes": 2**30}
    cpu = {"gpu_memory_bytes": None, "memory_bytes": 150 * 2**30}
    ranks = [
        rank_on("a", **gpu),
        rank_on("b", **gpu | {"gpu": "V100", "gpu_memory_bytes": 32 * 2**30}),
        rank_on("c", **cpu),
    ]
    (line, *others) = diagnose.node_problems({"memory_per_rank_bytes": 100 * 2**30}, ranks)
    assert line.startswith(
        "a rank on V100 of b needs about 100.0 GiB, but 32.0 GiB is available; lower batch.micro_rows"
    )
    assert others == []
    table = {"zero2": {"none": 33.0, "full": 32.5}, "zero3": {"none": 32.5, "full": 31.9}}
    run = {"memory_per_rank_bytes": 100 * 2**30, "memory_gib_by_stage_and_recomputation": table}
    (line,) = diagnose.node_problems(run, ranks)
    assert line.endswith("; set deepspeed=zero3 and activation_checkpointing=full, which need 31.9 GiB")
    (line,) = diagnose.node_problems({"memory_per_rank_bytes": 100 * 2**30}, [ranks[2], ranks[2]])
    assert line.startswith("2 ranks on c need about 200.0 GiB, but 150.0 GiB is available")


def test_the_doctor_explains_how_to_probe_the_nodes(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    write_manifest(tmp_path, 8192)
    argv = ["doctor", "tiny", "--json", "--nodes", "2", "--ranks", "2", f"data.path={tmp_path}", f"output={tmp_path}"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["run"]["ranks"] == 4
    assert report["cluster"].startswith("not probed: run this inside an allocation (salloc --nodes=2 ...)")
    assert main(["doctor", "--nodes", "2"]) == 2
    assert "--nodes and --hostfile need a CONFIG" in capsys.readouterr().err
