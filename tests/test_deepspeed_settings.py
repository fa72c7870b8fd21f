"""The installed DeepSpeed checks every key and value of a user's JSON before a run starts."""

import json
from pathlib import Path

import pytest

from fusiontree.config import check_deepspeed_file, deepspeed_json, load_config
from fusiontree.config import deepspeed as deepspeed_module
from fusiontree.errors import UserError
from fusiontree.zero import settings as settings_module
from fusiontree.zero.settings import examine, find_problem


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import DeepSpeed once, in this process, in place of a process for each check."""
    monkeypatch.setattr(deepspeed_module, "find_problem", lambda settings: examine(json.loads(json.dumps(settings))))


def refusal(settings: object, folder: Path) -> str:
    """Return the error for a DeepSpeed JSON, without its path."""
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        check_deepspeed_file(load_config("tiny", [f"deepspeed={path}"]))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"deepspeed {path}")
    return str(caught.value).removeprefix(f"deepspeed {path}").removeprefix(": ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "DeepSpeed has no key 'zero_optimisation'; did you mean 'zero_optimizat"),
        ({"gradient_cliping": 1.0}, "DeepSpeed has no key 'gradient_cliping'; remove it and set optimizer.grad_clip"),
        ({"colour": 1.0}, "DeepSpeed has no key 'colour'; remove it"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "DeepSpeed has no key 'zero_optimization.overlap_com",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "DeepSpeed has no key 'zero_optimization.offload_optimizer.pin_memry'; did you mean "
            "'zero_optimization.offload_optimizer.pin_memory'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device is 'gpu'; it must be 'none', 'cpu' or 'nvme'",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "x"}},
            "zero_optimization.reduce_bucket_size is 'x'; it must be a valid integer",
        ),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "DeepSpeed refuses it (compute_grad_norm=false",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            "DeepSpeed refuses it (MiCS ZeRO-3 sharding has been",
        ),
        ({"sparse_attention": {}}, "DeepSpeed refuses it (DeepSpeed Sparse Attention has been removed"),
        ({"communication_data_type": "fp12"}, "DeepSpeed refuses it (Invalid communication_data_type"),
        # sections without a pydantic model, whose unknown keys DeepSpeed ignores
        ({"aio": {"block_sizes": 3}}, "DeepSpeed has no key 'aio.block_sizes'; did you mean 'aio.block_size'?"),
        ({"flops_profiler": {"profile_stp": 3}}, "DeepSpeed has no key 'flops_profiler.profile_stp'; did you mean"),
        # top-level values, which DeepSpeed does not check
        ({"prescale_gradients": "yes"}, "prescale_gradients is 'yes'; it must be true or false"),
        ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor is '2'; it must be a number"),
    ],
)
def test_an_unknown_key_or_a_refused_value_is_one_line(
    in_process: None, settings, message: str, tmp_path: Path
) -> None:
    assert refusal(settings, tmp_path).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1e8}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}},
        {
            "zero_optimization": {"stage": 1},
            "communication_data_type": "bf16",
            "gradient_predivide_factor": 2,
            "prescale_gradients": True,
            "wall_clock_breakdown": True,
            "dump_state": False,
            "comms_logger": {"enabled": True, "verbose": False},
            "flops_profiler": {"enabled": True, "profile_step": 3},
            "aio": {"block_size": 1048576, "queue_depth": 8},
            "compile": {"deepcompile": False},
        },
    ],
)
def test_valid_settings_are_accepted(in_process: None, settings, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    check_deepspeed_file(load_config("tiny", [f"deepspeed={path}"]))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme"])
def test_shipped_settings_pass_the_check_that_they_are_spared(name: str) -> None:
    settings = deepspeed_json(load_config("tiny", [f"deepspeed={name}", "nvme_path=/fast"]))
    assert examine(settings) is None


@pytest.mark.slow
def test_the_check_runs_in_a_process_of_its_own(capfd: pytest.CaptureFixture) -> None:
    problem = find_problem({"zero_optimisation": {}})
    assert problem is not None
    assert problem.key == "zero_optimisation"
    assert "zero_optimization" in problem.known
    assert capfd.readouterr() == ("", "")


def test_a_broken_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('libcuda.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"DeepSpeed cannot be imported \(RuntimeError: libcuda.so is missing\)"):
        settings_module.find_problem({})


@pytest.mark.parametrize("key", ["stage3_prefetch_bucket_size", "zero_hpz_partition_size", "contiguous_gradients"])
def test_a_setting_that_block_gathers_replace_is_refused_by_name(key: str, tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 3, key: 1}}
    assert refusal(settings, tmp_path).startswith(
        f" sets 'zero_optimization.{key}'; remove it: without offloading, stage 3"
    )
    settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    path = tmp_path / "offloaded.json"
    path.write_text(json.dumps(settings))
    assert deepspeed_json(load_config("tiny", [f"deepspeed={path}"])) == settings


def test_a_reduction_in_another_dtype_is_refused_at_stage_3(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}
    assert refusal(settings, tmp_path).startswith(
        " sets 'communication_data_type'; remove it: without offloading, stage 3"
    )
