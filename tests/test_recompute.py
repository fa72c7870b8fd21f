"""Recomputed activations are exact: gradients are bitwise equal, and only the chosen parts run twice."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from conftest import build, documents_of

from fusiontree.config import load_config
from fusiontree.errors import UserError
from fusiontree.model.lm import HybridLM
from fusiontree.model.recompute import Recompute

BOTH = ("mamba", "attention")
POLICIES = {
    "full": Recompute(every=1),
    "every second block": Recompute(every=2),
    "scan branch": Recompute(branches=("mamba",)),
    "attention": Recompute(branches=("attention",)),
    "both branches": Recompute(branches=BOTH),
}
DOCUMENTS = documents_of([[25, 15], [40]])
IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))


def gradients(model: HybridLM, recompute: Recompute) -> list[torch.Tensor]:
    """Compute gradients of a loss that includes the gates, with branches dropped in some layers."""
    model.recompute = recompute
    model.zero_grad()
    output = model(IDS, DOCUMENTS, labels=IDS, branch_drops=[None, "mamba", "attention"])
    (output.loss_sum + 3 * output.gates.square().sum()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "change", [{}, {"srte": "learned"}, {"srte": "learned", "srte_shared": False}, {"srte": "none"}]
)
def test_gradients_are_bitwise_equal_with_and_without_recomputation(change: dict, offload: bool) -> None:
    model = build(**change)
    expected = gradients(model, Recompute())
    for name, policy in POLICIES.items():
        actual = gradients(model, Recompute(policy.every, policy.branches, offload))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name


def runs(policy: Recompute) -> Counter[str]:
    """Count the forward passes of each block and branch in one update."""
    model, counts = build(), Counter()
    for name, module in model.named_modules():
        if name.split(".")[-1] in BOTH or name.split(".")[:-1] == ["blocks"]:
            module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    gradients(model, policy)
    return counts


@pytest.mark.parametrize(
    ("policy", "twice"),
    [
        (Recompute(), []),
        (POLICIES["full"], ["blocks.0", "blocks.1", "blocks.2"]),
        (POLICIES["every second block"], ["blocks.0", "blocks.2"]),
        (POLICIES["scan branch"], [f"blocks.{i}.mamba" for i in range(3)]),
        (POLICIES["attention"], [f"blocks.{i}.attention" for i in range(3)]),
    ],
)
def test_only_the_chosen_parts_run_twice(policy: Recompute, twice: list[str]) -> None:
    expected = {
        name: 1 + any(name == part or name.startswith(f"{part}.") for part in twice)
        for layer in range(3)
        for name in (f"blocks.{layer}", f"blocks.{layer}.mamba", f"blocks.{layer}.attention")
    }
    assert runs(policy) == expected


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_an_offloaded_input_is_freed_on_the_device(offload: bool) -> None:
    model, inputs = build(), []
    model.recompute = Recompute(every=1, offload=offload)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    loss = model(IDS, DOCUMENTS, labels=IDS).loss_sum
    gc.collect()
    assert [kept() is None for kept in inputs] == [offload] * 3
    loss.backward()


def test_the_short_form_sets_the_policy() -> None:
    short = load_config("tiny", ["activation_checkpointing=every_n"])
    assert short == load_config("tiny", ["activation_checkpointing.policy=every_n"])
    assert short.activation_checkpointing.every == 2
    more = ["activation_checkpointing={policy: branch, branch: mamba, offload: true}"]
    chosen = load_config("tiny", more).activation_checkpointing
    assert (chosen.policy, chosen.branch, chosen.offload) == ("branch", "mamba", True)


def test_offload_without_recomputation_is_refused() -> None:
    with pytest.raises(UserError, match=r"policy none recomputes nothing; set policy, or offload: false"):
        load_config("tiny", ["activation_checkpointing=none", "activation_checkpointing.offload=true"])
