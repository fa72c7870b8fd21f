"""On a real bf16 engine the scan's parameters are stored and used in fp32, and three updates are three Adam steps."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import MICRO, build, python

from fusiontree.model import pointwise
from fusiontree.model.reference import scan_step

PROGRAM = """
import dataclasses, json, sys
import numpy as np, torch
from fusiontree.distributed import collectives
from fusiontree.config import load_config
from fusiontree.data.batch import collate
from fusiontree.model.lm import HybridLM, materialize, seeded_init
from fusiontree.training.step import TrainingStep


def gathered(parameters):
    with GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


world = collectives.start()
from deepspeed.runtime.zero import GatheredParameters
results = []
for deepspeed in sys.argv[1].split(","):
    settings = [f"deepspeed={deepspeed}", "precision=bf16", "batch.tokens=256", *sys.argv[2:]]
    config = load_config("tiny", settings)
    with torch.device("meta"):
        plain = HybridLM(config.model)
    list(materialize(plain, seeded_init(config.seed), torch.device("cpu")))
    training = TrainingStep(config, world)
    model, used = training.engine.module, set()
    as_initialized = all(map(torch.equal, gathered([*model.parameters()]), gathered([*plain.parameters()])))
    for block in model.blocks:
        scan, stream = block.mamba.kernels.scan, []

        def recording(x, dt, A, B_in, C_out, D, *rest, scan=scan, **options):
            used.add(("A", A.dtype)), used.add(("D", D.dtype)), used.add(("dt", dt.dtype)), used.add(("x", x.dtype))
            return scan(x, dt, A, B_in, C_out, D, *rest, **options)

        block.mamba.kernels = dataclasses.replace(block.mamba.kernels, scan=recording)
        block.register_forward_hook(lambda _m, _i, out: used.add(("stream", out[0].dtype)))
    tokens = np.arange(256).reshape(2, 128) % 500
    batch = collate(tokens, [np.array([100, 128])] * 2)
    losses = [float(training.update([batch], step).loss) for step in range(3)]
    stored = {str(p.dtype) for n, p in model.named_parameters() if n.rpartition(".")[2] in ("A_log", "D", "dt_bias")}
    adam = getattr(training.engine.optimizer, "optimizer", training.engine.optimizer)
    counts = sorted({float(state["step"]) for state in adam.state.values()})
    figures = {"losses": losses, "as_initialized": as_initialized, "counts": counts}
    results.append({"used": sorted([n, str(d)] for n, d in used), "stored": sorted(stored), **figures})
collectives.leave()
print(json.dumps(results))
"""


def test_state_parameters_are_fp32_at_every_stage(tmp_path: Path) -> None:
    gathered = tmp_path / "zero3.json"  # partition even the smallest parameters
    gathered.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    stages = ["zero1", "zero0", "zero2", "zero3", str(gathered)]
    shape = [f"{key}={value}" for key, value in MICRO.items() if key not in ("batch.tokens",)]
    results = json.loads(python("-c", PROGRAM, ",".join(stages), *shape).stdout.strip().splitlines()[-1])
    assert len(results) == len(stages)
    for stage, result in zip(stages, results, strict=True):
        assert result["stored"] == ["torch.float32"], stage
        assert dict(result["used"]) == {
            **dict.fromkeys(("A", "D", "dt"), "torch.float32"),
            **dict.fromkeys(("x", "stream"), "torch.bfloat16"),
        }, stage
        assert (result["as_initialized"], result["counts"]) == (True, [3.0]), (
            stage
        )  # DeepSpeed's own bf16 engine takes an extra step at the start
        assert result["losses"] == pytest.approx(results[0]["losses"], rel=2e-2), stage
        assert result["losses"][2] < result["losses"][0], stage


@torch.no_grad()
def test_decay_and_time_step_are_computed_in_fp32_in_a_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dtype=torch.bfloat16)
    branch, calls = model.blocks[0].mamba, []

    def recording(scan, x, dt, A, B_in, C_out, D, *rest, **options):
        calls.append((dt, A, D))
        return scan(x, dt, A, B_in, C_out, D, *rest, **options)

    scan = branch.kernels.scan
    branch.kernels = dataclasses.replace(
        branch.kernels, scan=lambda *args, **options: recording(scan, *args, **options)
    )
    monkeypatch.setattr(pointwise, "scan_step", lambda *args: recording(scan_step, *args))
    branch.in_proj.weight.zero_()  # the time step then depends on the bias only
    cache = model.new_cache(1)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    steps, decay = F.softplus(branch.dt_bias), -torch.exp(branch.A_log)
    assert not any(torch.equal(exact, exact.bfloat16().float()) for exact in (steps, decay))
    for dt, A, D in (calls[0], calls[-model.config.num_layers]):  # this layer's prefill and its decoding step
        assert torch.equal(dt, steps.expand_as(dt))
        assert torch.equal(A, decay)
        assert torch.equal(D, branch.D)
