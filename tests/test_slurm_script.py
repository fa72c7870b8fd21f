"""The sbatch script, compared word by word, and the checks before submission."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import write_manifest

from fusiontree import cli
from fusiontree.config import load_config
from fusiontree.errors import UserError
from launcher import sbatch
from launcher.job import LaunchOptions, plan_slurm
from launcher.sbatch import JobOptions, Sweep

PYTHON = sys.executable

GOLDEN = f"""\
#!/bin/bash
#SBATCH --job-name=books
#SBATCH --nodes=2-4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --partition=a100
#SBATCH --account=lab
#SBATCH --qos=long
#SBATCH --time=4:00:00
#SBATCH --constraint=ib
#SBATCH --signal=USR1@300
#SBATCH --output=/shared/runs/books/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mem=0

# books: 4 x 8 ranks
# Written by `fusiontree launch`. Keep it, edit it, submit it again: the run resumes from its newest checkpoint.

cd /shared || exit 1
module load cuda/12.8
export NCCL_DEBUG=INFO
export DS_ACCELERATOR=cuda
export GREETING='hello world'

run=/shared/runs/books

# select nodes and rendezvous; exit if too many attempts made no progress
facts=$({PYTHON} -m launcher.allocation begin "$run" --ranks-per-node 8 --nodes 2-4 --save-ahead 300) || exit
eval "$facts"

srun --nodes="$nodes" --ntasks=$((nodes * 8)) --ntasks-per-node=8 --cpus-per-task=6 \\
    --kill-on-bad-exit=1 --output="$logs/rank-%t.out" \\
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \\
    {PYTHON} -m fusiontree train "$run"/config.yaml --json

# log the first failure; then requeue the job, or exit with the run's code
{PYTHON} -m launcher.allocation end "$run" $?
"""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Fix the current folder, and leave one forwarded variable in the environment."""
    monkeypatch.setattr(os, "getcwd", lambda: "/shared")
    monkeypatch.setattr(Path, "absolute", lambda self: Path("/shared") / self)
    for name in list(os.environ):
        if name.startswith(
            ("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "CUDA_", "FUSIONTREE_", "WANDB_", "HF_", "OMP_")
        ):
            monkeypatch.delenv(name)
        if name.startswith(("DS_", "TRITON_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")


@pytest.fixture
def config(tmp_path):
    write_manifest(tmp_path, 8192)
    return load_config("tiny", [f"data.path={tmp_path}", "name=books", "batch.tokens=131072"])


def rendered(config, job: JobOptions, nodes: int = 1, ranks: int = 2, names: tuple[str, ...] = ("books",)) -> str:
    options = LaunchOptions({"GREETING": "hello world"}, ("module load cuda/12.8",))
    plan = plan_slurm(config, nodes, ranks, job.gpus_per_node is not None, ["--json"], options)
    return sbatch.render(plan, job, [Path("/shared/runs") / name for name in names], Path("/shared/runs/books/logs"))


def test_the_complete_script(config):
    job = JobOptions(
        gpus_per_node=8,
        min_nodes=2,
        partition="a100",
        account="lab",
        qos="long",
        time="4:00:00",
        constraint="ib",
        cpus_per_task=6,
        extra=("exclusive", "--mem=0"),
        save_ahead=300,
    )
    assert rendered(config, job, nodes=4, ranks=8) == GOLDEN


def test_deepspeed_may_start_the_ranks_of_a_node(config):
    script = rendered(config, JobOptions(tasks="node"))
    assert "#SBATCH --ntasks-per-node=1\n" in script
    assert 'srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \\\n' in script
    assert (
        '    bash -c \'trap "" USR1; exec "$0" -m deepspeed.launcher.launch --node_rank=$SLURM_PROCID '
        "--world_info=$WORLD_INFO --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --no_local_rank "
        f'--module "$@"\' {PYTHON} \\\n    fusiontree train "$run"/config.yaml --json\n'
    ) in script


def test_a_sif_runs_in_apptainer(config):
    script = rendered(config, JobOptions(gpus_per_node=2, container="/images/ft.sif", container_mounts="/data:/data"))
    assert (
        "rank \\\n    apptainer exec --nv --bind /shared --bind /data:/data /images/ft.sif python -m fusiontree train "
    ) in script
    assert 'bash -c \'trap "" USR1; export RANK=' in script


def test_any_other_image_runs_in_pyxis(config):
    script = rendered(config, JobOptions(container="nvcr.io#nvidia/pytorch:25.06-py3", container_mounts="/data:/data"))
    options = "--container-image='nvcr.io#nvidia/pytorch:25.06-py3' --container-mounts=/shared:/shared,/data:/data"
    assert f"    {options} --container-workdir=/shared \\\n    bash -c 'export RANK=" in script
    assert "rank \\\n    python -m fusiontree train " in script
    assert f"{PYTHON} -m launcher.allocation end" in script  # outside the container


def test_an_oci_bundle_runs_in_slurms_own_container_without_further_mounts(config):
    script = rendered(config, JobOptions(container="oci:/images/my bundle"))
    first = 'bash -c \': "${SLURM_PROCID:?is not set inside}"; cd /shared || exit; export RANK='
    assert f"    --container='/images/my bundle' \\\n    {first}" in script
    assert "rank \\\n    python -m fusiontree train " in script
    with pytest.raises(
        UserError, match="--container-mounts /a:/b: an OCI bundle defines its own mounts; add them to /b/config"
    ):
        rendered(config, JobOptions(container="oci:/b", container_mounts="/a:/b"))


def test_a_container_mounts_the_folders_of_runs_outside_the_current_one(config, tmp_path):
    options = LaunchOptions()
    plan = plan_slurm(config, 1, 1, False, [], options)
    script = sbatch.render(
        plan, JobOptions(container=str(tmp_path)), [Path("/scratch/runs/books")], Path("/scratch/logs")
    )
    assert (
        f"apptainer exec --bind /shared --bind /scratch/runs {tmp_path} python" in script
    )  # a folder is an apptainer sandbox


def test_a_sweep_is_a_job_array_of_runs_with_different_names(config):
    sweep = Sweep.from_axes("books", ["optimizer.lr=1e-3,3e-4", "deepspeed=a/b.json"])
    assert sweep.runs == (
        ("optimizer.lr=1e-3", "deepspeed=a/b.json", "name=books-lr1e-3-deepspeeda_b.json"),
        ("optimizer.lr=3e-4", "deepspeed=a/b.json", "name=books-lr3e-4-deepspeeda_b.json"),
    )
    script = rendered(config, JobOptions(), names=("books-1", "books-2"))
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --output=/shared/runs/books/logs/slurm-%A_%a.log\n" in script
    assert (
        "case $SLURM_ARRAY_TASK_ID in\n    0) run=/shared/runs/books-1 ;;\n    1) run=/shared/runs/books-2 ;;\nesac\n"
    ) in script
    assert Sweep.from_axes("books", []).runs == ((),)


@pytest.mark.parametrize("axis", ["lr", "lr=", "=1", "lr=1,,2"])
def test_a_sweep_needs_values(axis):
    with pytest.raises(UserError, match=r"--sweep '.*' is not of the form key=v1,v2"):
        Sweep.from_axes("books", [axis])


def test_a_sweep_refuses_a_repeated_value():
    with pytest.raises(UserError, match="two runs have the same values"):
        Sweep.from_axes("books", ["seed=1,1"])


def test_the_script_contains_no_secrets(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "1234")
    monkeypatch.setenv("WANDB_PROJECT", "trees")
    script = rendered(config, JobOptions())
    assert "1234" not in script
    assert "export WANDB_PROJECT=trees\n" in script


def test_cpu_ranks_have_one_thread_by_default(config, monkeypatch):
    assert "export OMP_NUM_THREADS=1\nexport DS_ACCELERATOR=cpu\n" in rendered(config, JobOptions())
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "export OMP_NUM_THREADS=4\n" in rendered(config, JobOptions())


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_time_limits_are_parsed_as_by_sbatch(limit, expected):
    assert sbatch.parse_time_limit(limit) == expected


@pytest.mark.parametrize("limit", ["", "tomorrow", "1:2:3:4", "-5", "1-"])
def test_malformed_time_limits_are_refused(limit):
    with pytest.raises(UserError, match="--time .*: give minutes"):
        sbatch.parse_time_limit(limit)


def test_the_reserved_time_follows_the_runs_own_saves(tmp_path):
    config = load_config("7b", ["data.path=x", f"output={tmp_path}", "name=r", "batch.tokens=3997696"])
    config.run_dir.mkdir()
    lines = [{"step": 1, "tokens_per_s": 99942.4}, {"step": 2, "tokens_per_s": 2e5, "save_seconds": 300.0}]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sbatch.estimate_save_ahead(config, 4) == 2 * 40 + 2 * 300
    quick = [{"step": step, "tokens_per_s": 4e6, "save_seconds": 5.0} for step in range(3, 23)]
    with open(config.run_dir / "metrics.jsonl", "a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in quick)
    assert sbatch.estimate_save_ahead(config, 4) == 60 + 2 * 5


def test_the_reserved_time_grows_with_the_model_and_shrinks_with_nodes(config):
    big = load_config("7b", ["data.path=x"])
    assert sbatch.estimate_save_ahead(config, 1) == 60
    assert sbatch.estimate_save_ahead(big, 1) - 60 == pytest.approx(16 * big.model.parameter_count() / 0.5e9, abs=1)
    assert sbatch.estimate_save_ahead(big, 4) - 60 == pytest.approx(
        (sbatch.estimate_save_ahead(big, 1) - 60) / 4, abs=1
    )


@pytest.mark.parametrize(
    ("options", "threads"),
    [([], 1), (["--cpus-per-task", "6"], 6), (["--cpus-per-task", "6", "--tasks", "node"], 3)],
)
def test_cpu_ranks_have_a_thread_per_core(options, threads, config, capsys):
    words = ["--slurm", "--ranks-per-node", "2", "--dry-run", f"data.path={config.data.path}", "batch.tokens=131072"]
    assert cli.main(["launch", "tiny", *options, *words]) == 0
    assert f"export OMP_NUM_THREADS={threads}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slurm"], "--slurm needs --gpus-per-node G, or --ranks-per-node N"),
        (["--slurm", "--ranks-per-node", "3"], "does not divide among 3 ranks"),
        (["--slurm", "--ranks-per-node", "0", "--nodes", "2"], "both must be at least 1"),
        (["--slurm", "--ranks-per-node", "1", "--time", "1"], "--time 1 is 60 s, and the ranks are asked to save 60 s"),
        (["--slurm", "--ranks-per-node", "1", "--min-nodes", "2"], "--min-nodes is 2; it must be from 1 to 1"),
        (["--slurm", "--ranks-per-node", "1", "--nodes", "4", "--min-nodes", "3"], "does not divide among 3 ranks"),
        (["--slurm", "--ranks-per-node", "1", "--include", "a"], "--include belongs to --hostfile, not to --slurm"),
        (["--local", "1", "--partition", "p"], "--partition belongs to --slurm, not to --local"),
        (["--local", "1", "--env", "A"], "--env: 'A' is not of the form KEY=VALUE"),
        (["--local", "1", "--env-file", "nowhere"], "--env-file nowhere does not exist"),
        (["--slurm", "--ranks-per-node", "1"], "--slurm: no sbatch on PATH"),
    ],
)
def test_a_job_that_cannot_run_is_refused_in_one_line(options, message, config, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    overrides = [f"data.path={tmp_path}", "batch.tokens=65536", f"output={tmp_path}/runs"]
    assert cli.main(["launch", "tiny", *options, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
