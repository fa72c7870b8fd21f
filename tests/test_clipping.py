"""Clipping in the optimizer's kernel equals torch's; an update with a non-finite gradient changes nothing."""

import json

import pytest
from conftest import MICRO, python

PROGRAM = """
import json, sys, traceback
import numpy as np, torch
from torch.utils._python_dispatch import TorchDispatchMode
from fusiontree.distributed import collectives
from fusiontree.config import load_config
from fusiontree.data.batch import collate
from fusiontree.model.documents import to_device
from fusiontree.model.lm import HybridLM, materialize, seeded_init
from fusiontree.training.optimizer import build_optimizer
from fusiontree.training.step import TrainingStep

WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
BAD, UPDATES, bad = 2, 5, [False]
tokens = np.arange(512).reshape(4, 128) % 500
batches = [collate(tokens[i : i + 2], [np.array([100, 128])] * 2) for i in (0, 2)]


class Syncs(TorchDispatchMode):
    # records every operation by which the host would wait for a value of the device

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITS:
            self.found.append(f"{function}: " + " ".join(traceback.format_stack(limit=6)[:-1]))
        return function(*args, **(kwargs or {}))


def with_bad_gradients(model):
    model.embedding.weight.register_hook(lambda g: g * float("inf") if bad[0] else g)
    return model


def plain(config):
    with torch.device("meta"):
        model = HybridLM(config.model)
    list(materialize(model, seeded_init(config.seed), torch.device("cpu")))
    with_bad_gradients(model)
    optimizer = build_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr
    norms = []
    for update in range(UPDATES):
        bad[0] = update == BAD
        for batch in batches:
            ids, labels, documents = to_device(batch, "cpu")
            (model(ids, documents, labels=labels).loss_sum / sum(b.real_tokens for b in batches)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip).item())
        if not bad[0]:
            optimizer.step()
        optimizer.zero_grad()
    return norms, model


def engine(config, world):
    training = TrainingStep(config, world)
    model = with_bad_gradients(training.engine.module)
    norms, kept, syncs = [], True, Syncs()
    for update in range(UPDATES):
        bad[0] = update == BAD
        before = [p.detach().clone() for p in model.parameters()]
        with syncs:
            made = training.update(batches, update)
        norms.append(float(made.grad_norm))
        if bad[0]:
            kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return norms, model, kept, syncs.found


world, results = collectives.start(), []
for stage in ("zero0", "zero1", "zero2"):
    config = load_config("tiny", [f"deepspeed={stage}", "batch.tokens=512", *sys.argv[1:]])
    expected_norms, expected = plain(config)
    norms, model, kept, syncs = engine(config, world)
    apart = max((a - b).abs().max().item() for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    found = {"stage": stage, "norms": norms, "expected": expected_norms}
    results.append(found | {"kept": kept, "apart": apart, "syncs": syncs})
collectives.leave()
print(json.dumps(results))
"""
CLIP, RATE = 0.3, 1e-3


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """Run the program; return its results for each ZeRO stage with fused clipping."""
    shape = [f"{key}={value}" for key, value in MICRO.items() if key != "batch.tokens"]
    shape += [f"optimizer.grad_clip={CLIP}", f"optimizer.lr={RATE}", "schedule.kind=constant", "batch.micro_rows=2"]
    shape += ["precision=fp32", "schedule.warmup_steps=0"]
    return json.loads(python("-c", PROGRAM, *shape).stdout.strip().splitlines()[-1])


def test_clipping_equals_torchs_and_a_non_finite_update_is_skipped(results: list[dict]) -> None:
    assert [result["stage"] for result in results] == ["zero0", "zero1", "zero2"]
    for result in results:
        finite = [norm for i, norm in enumerate(result["norms"]) if i != 2]
        assert finite == pytest.approx([norm for i, norm in enumerate(result["expected"]) if i != 2], rel=1e-4)
        assert min(finite) > CLIP, "nothing was clipped"
        assert not abs(result["norms"][2]) < float("inf")
        assert result["kept"], "the non-finite update changed weights"
        assert result["apart"] < 0.02 * RATE, result["stage"]


def test_an_ordinary_update_does_not_wait_for_the_device(results: list[dict]) -> None:
    """The figures of a `HostSum` are the exception. On a CPU the same operations show where a GPU would stall."""
    assert [result["syncs"] for result in results] == [[], [], []]
