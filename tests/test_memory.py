"""What the doctor says of a run: memory and disk, held to what was measured; nodes that are not alike."""

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
    ("overrides", "measured"),  # peak GiB of one H200, docs/performance.md and docs/training.md
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
def test_memory_of_the_1b_preset_is_within_15_percent_of_an_h200s(overrides, measured):
    found = memory.estimate(load_config("1b", overrides), 1)
    assert found["memory_per_rank_bytes"] / 2**30 == pytest.approx(measured, rel=0.15)


def test_the_table_has_the_chosen_settings_figure(tmp_path):
    config = load_config("1b", ["deepspeed=zero2"])
    table = memory.table(config, 8)
    assert set(table) == {"zero0", "zero1", "zero2", "zero3"}
    chosen = memory.estimate(config, 8)["memory_per_rank_bytes"] / 2**30
    assert table["zero2"]["full"] == pytest.approx(chosen, abs=0.06)
    assert table["zero3"]["full"] < table["zero2"]["full"] < table["zero1"]["full"] < table["zero0"]["none"]


def test_policies_between_none_and_full_lie_between_them():
    def peak(*overrides: str) -> int:
        return memory.activation_bytes(load_config("1b", [f"activation_checkpointing.{o}" for o in overrides]))

    none, full = peak("policy=none"), peak("policy=full")
    half, branch = peak("policy=every_n", "every=2"), peak("policy=branch", "branch=mamba")
    assert full < half < none
    assert full < branch < none
    assert peak("policy=full", "offload=true") < full


def test_a_checkpoint_takes_what_a_real_one_takes(shards, tmp_path):
    from conftest import cli, settings

    words = settings(shards, tmp_path, name="run", schedule__steps=1, schedule__warmup_steps=0, validation__every=0)
    cli("train", "tiny", *words)
    real = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-1").iterdir())
    assert memory.checkpoint_bytes(load_config("tiny", words)) == pytest.approx(real, rel=0.05)


def test_a_disk_that_cannot_hold_the_checkpoints_is_a_problem(tmp_path, monkeypatch):
    config = load_config("1b", [f"output={tmp_path}/deep/er", "checkpoint.keep_last=3"])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**40))
    diagnose._check_disk(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(50 * 2**30))
    line = r"checkpoints take up to 84\.\d GiB \(21\.\d GiB each\), .* has 50\.0 GiB free"
    with pytest.raises(UserError, match=line):
        diagnose._check_disk(config)


# --- a cluster's nodes, as the probe finds them ----------------------------------------------------------------------


def rank_on(host: str, address: str = "10.0.0.1", **changes: object) -> dict:
    versions = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    return {
        "host": host, "address": address, "interfaces": ["eth0"], "versions": versions, "nccl": None, "gpu": None,
    } | changes  # fmt: skip


def test_equal_nodes_are_no_problem():
    found = compare({"ranks": [rank_on("a"), rank_on("a"), rank_on("b", "10.0.0.2")], "all_reduce": {}})
    assert found["problems"] == []
    assert (found["ranks"], found["hosts"]) == (3, {"a": "10.0.0.1 (eth0)", "b": "10.0.0.2 (eth0)"})


def test_nodes_that_differ_or_cannot_be_reached_are_named():
    other = rank_on("b", "127.0.1.1", versions={"torch": "2.12.0", "deepspeed": None}, gpu="A100")
    problems = compare({"ranks": [rank_on("a"), other], "all_reduce": {}})["problems"]
    assert [problem.split(";")[0] for problem in problems] == [
        "torch is 2.12.0 on b, 2.13.0 on a",
        "deepspeed is None on b, 0.19.8 on a",
        "gpu is A100 on b, None on a",
        "host b takes its own name for 127.0.1.1, where no other reaches it",
    ]


def test_the_memory_that_counts_is_that_of_the_nodes(tmp_path):
    """A machine without GPUs, where jobs are launched, need not hold what its nodes will."""
    report = diagnose.diagnose(load_config("13b", [f"output={tmp_path}"]), 8, 2)
    assert not [problem for problem in report["problems"] if "needed by" in problem]
    gpu = {"gpu": "H200", "gpu_memory_bytes": 141 * 10**9, "memory_bytes": 2**30}
    cpu = {"gpu_memory_bytes": None, "memory_bytes": 150 * 2**30}
    ranks = [
        rank_on("a", **gpu),
        rank_on("b", **gpu | {"gpu": "V100", "gpu_memory_bytes": 32 * 2**30}),
        rank_on("c", **cpu),
    ]
    (line, *others) = diagnose.node_problems({"memory_per_rank_bytes": 100 * 2**30}, ranks)
    assert line.startswith("about 100.0 GiB needed by a rank on V100 of b, 32.0 GiB there; lower batch.micro_rows")
    assert others == []
    table = {"zero2": {"none": 33.0, "full": 32.5}, "zero3": {"none": 32.5, "full": 31.9}}
    run = {"memory_per_rank_bytes": 100 * 2**30, "memory_gib_by_stage_and_recomputation": table}
    (line,) = diagnose.node_problems(run, ranks)
    assert line.endswith("; deepspeed=zero3 with activation_checkpointing=full needs 31.9 GiB")
    (line,) = diagnose.node_problems({"memory_per_rank_bytes": 100 * 2**30}, [ranks[2], ranks[2]])
    assert line.startswith("about 200.0 GiB needed by 2 ranks on c, 150.0 GiB there")


def test_the_doctor_says_how_to_reach_nodes_that_it_cannot(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    write_manifest(tmp_path, 8192)
    argv = ["doctor", "tiny", "--json", "--nodes", "2", "--ranks", "2", f"data.path={tmp_path}", f"output={tmp_path}"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["run"]["ranks"] == 4
    assert report["cluster"].startswith("not looked at: run this inside an allocation (salloc --nodes=2 ...)")
    assert main(["doctor", "--nodes", "2"]) == 2
    assert "--nodes and --hostfile need a CONFIG" in capsys.readouterr().err
