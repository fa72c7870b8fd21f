"""`fusiontree bench scale`: cases, equal losses of all engines, failures of a rank."""

import json

import pytest
from conftest import MICRO, cli

from fusiontree.bench.scale import Case, ScaleOptions, bench_scale
from fusiontree.bench.train import Workload
from fusiontree.errors import RunError, UserError

SHAPE = [f"{key}={value}" for key, value in MICRO.items() if not key.startswith(("batch.", "data."))]


def test_cases_are_all_combinations_with_fewer_ranks_first() -> None:
    options = ScaleOptions((1, 2), (1, 3), (4,), "fsdp2")
    assert options.cases() == [Case(e, n, 4) for n in (1, 2) for e in ("zero1", "zero3", "fsdp2")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (0,)}, "--ranks has 0; it must be at least 1"),
        ({"accumulate": (2, 0)}, "--accumulate has 0; it must be at least 1"),
        ({"stages": (4,)}, "--zero has 4; choose from 0, 1, 2 and 3"),
        ({"peer": "ddp"}, "--peer ddp is unknown; choose fsdp2"),
    ],
)
def test_an_invalid_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        ScaleOptions(**options)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.bench.scale.accelerator", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^--ranks has 4, but this machine has 2 GPU\(s\); use fewer ranks$"):
        bench_scale("tiny", [], Workload(), ScaleOptions((1, 4)))


@pytest.mark.slow
def test_all_engines_have_equal_losses_on_the_same_rows() -> None:
    command = ["bench", "scale", "--preset", "tiny", "--seq-len", "64", "--steps", "2", "--warmup", "1", "--json"]
    done = cli(*command, "--ranks", "2", "--zero", "1", "3", "--accumulate", "2", "--peer", "fsdp2", *SHAPE)
    figures = json.loads(done.stdout)
    cases = {case["engine"]: case for case in figures["cases"]}
    assert list(cases) == ["zero1", "zero3", "fsdp2"]
    for case in cases.values():
        assert case["loss"] == pytest.approx(cases["zero1"]["loss"], rel=1e-5)
        assert case["tokens_per_s_per_rank"] * case["step_seconds"] == pytest.approx(64 * 2)
        assert case["efficiency"] is None  # nothing was measured on one rank


@pytest.mark.slow
def test_a_failed_rank_is_one_line() -> None:
    missing = ["distill.teacher=nowhere", "distill.weight=1"]
    with pytest.raises(RunError, match=r"^rank \d of 2 \(zero1, 1 pass\(es\)\) failed: .*nowhere.*") as caught:
        bench_scale("tiny", [*SHAPE, *missing], Workload(seq_len=64, steps=1, warmup=0), ScaleOptions((2,), (1,)))
    assert "\n" not in str(caught.value)
