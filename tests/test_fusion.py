"""The gate is a no-op at initialization, each kind varies as specified, and its mean counts real tokens only."""

import dataclasses

import pytest
import torch
from conftest import SMALL, build, documents_of

from fusiontree.model import kernel_registry
from fusiontree.model.block import Fusion
from fusiontree.model.lm import branch_drops
from fusiontree.model.loss import IGNORE


def gate_of(fusion: Fusion, m: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Recover the gate from the fusion of m and a, [B, L, H], and check the reported mean against it."""
    fused, normed, mean = fusion(torch.zeros_like(m), m, a, torch.ones(m.shape[:2], dtype=torch.bool), torch.ones(32))
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(fused, (32,), eps=1e-5))
    gate = (fused / 2 - a) / (m - a)
    torch.testing.assert_close(mean, gate.mean((0, 1)), rtol=1e-4, atol=1e-4)
    return gate


@pytest.mark.parametrize("kind", ["channel", "token", "static", "sum"])
def test_at_initialization_every_gate_is_the_plain_sum(kind: str) -> None:
    x, m, a = torch.randn(3, 2, 5, 32)
    fusion = Fusion(dataclasses.replace(SMALL, fusion=kind), kernel_registry.select())
    fused, _, mean = fusion(x, m, a, torch.ones(2, 5, dtype=torch.bool), torch.ones(32))
    torch.testing.assert_close(fused, x + m + a, rtol=0, atol=1e-6)
    assert (mean == 0.5).all()


@pytest.mark.parametrize(
    ("kind", "varies"), [("channel", (True, True)), ("token", (True, False)), ("static", (False, True))]
)
def test_each_kind_of_gate_varies_by_token_or_channel_as_specified(kind: str, varies: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    fusion = Fusion(dataclasses.replace(SMALL, fusion=kind), kernel_registry.select())
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    m = torch.randn(1, 5, 32)
    gate = gate_of(fusion, m, m + 1 + torch.rand(1, 5, 32))
    assert ((gate >= -1e-5) & (gate <= 1 + 1e-5)).all()
    assert (bool((gate.std(1) > 1e-3).any()), bool((gate.std(2) > 1e-3).any())) == varies


def test_the_mean_gate_excludes_padding() -> None:
    model = build()
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 25:] = IGNORE
    documents = documents_of([[25, 15]])
    gates = model(ids, documents, labels=labels).gates
    short = model(ids[:, :25], labels=ids[:, :25]).gates
    torch.testing.assert_close(gates, short, rtol=1e-4, atol=1e-5)
    assert gates.shape == (3, 32)


def test_branch_drops_are_a_function_of_seed_and_step() -> None:
    config = dataclasses.replace(SMALL, branch_drop=0.5, num_layers=200)
    drops = branch_drops(config, seed=1, step=7)
    assert drops == branch_drops(config, seed=1, step=7)
    assert drops != branch_drops(config, seed=1, step=8)
    assert drops != branch_drops(config, seed=2, step=7)
    assert 60 < sum(drop is not None for drop in drops) < 140
    assert {"mamba", "attention", None} == set(drops)
    assert branch_drops(SMALL, 0, 0) == [None, None, None]


@pytest.mark.parametrize("dropped", ["mamba", "attention"])
def test_a_dropped_branch_has_no_effect(dropped: str) -> None:
    model = build()
    ids = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, branch_drops=[dropped] * 3).logits
        for block in model.blocks:
            getattr(block, dropped).out_proj.weight.normal_()
        assert torch.equal(model(ids, branch_drops=[dropped] * 3).logits, before)
        assert not torch.equal(model(ids).logits, before)
