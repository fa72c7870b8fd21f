"""Every parameter has the optimizer and the weight decay that its name implies."""

import re

import pytest
import torch
from conftest import build

from fusiontree.config import OptimizerConfig, load_config
from fusiontree.errors import UserError
from fusiontree.training.optimizer import build_optimizer, parameter_groups

MATRICES = r"blocks\.\d+\.(mamba\.(in|out)_proj|attention\.(qkv|out)_proj|mlp\.(gate_up|down))\.weight"
# no weight decay: norms, biases, the scan's state parameters, the gate
NO_DECAY = r".*(norm|norm\.weight|bias|A_log|D|dt_bias|fusion\..*)"
SHAPES = [
    {},
    {"srte": "learned", "tie_embeddings": False},
    {"srte": "learned", "srte_shared": False, "fusion": "token"},
]


def names_by_group(config: OptimizerConfig, **changes: object) -> list[tuple[dict, set[str]]]:
    model = build(**changes)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    found = [(group, {names[parameter] for parameter in group["params"]}) for group in groups]
    assert sorted(name for _, group in found for name in group) == sorted(names.values())
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("changes", SHAPES)
def test_norms_biases_state_parameters_and_the_gate_never_decay(kind: str, changes: dict) -> None:
    for group, names in names_by_group(OptimizerConfig(kind=kind, lr=1e-3, weight_decay=0.1, grad_clip=0.0), **changes):
        for name in names:
            assert (group["weight_decay"] == 0) == (re.fullmatch(NO_DECAY, name) is not None), name


@pytest.mark.parametrize("changes", SHAPES)
def test_muon_updates_exactly_the_matrices_of_the_blocks(changes: dict) -> None:
    config = OptimizerConfig(kind="muon", lr=1e-3, grad_clip=0.0)
    for group, names in names_by_group(config, **changes):
        for name in names:
            assert group["use_muon"] == (re.fullmatch(MATRICES, name) is not None), name
        assert group["use_muon"] or group["lr"] == 1e-3


@pytest.mark.slow
def test_muon_updates_and_decays_by_as_much_as_adamw() -> None:
    config = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.0, grad_clip=0.0)
    model = build()
    optimizer = build_optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer.step()
    for name, parameter in model.named_parameters():
        change = (parameter.detach() - before[name]).square().mean().sqrt().item()
        expected = 0.2 * config.lr if re.fullmatch(MATRICES, name) else config.lr  # AdamW's first step is its sign
        assert change == pytest.approx(expected, rel=0.3), name
    for group in parameter_groups(model, OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1, grad_clip=0.0)):
        assert group["weight_decay"] == 0 or group["lr"] * group["weight_decay"] == pytest.approx(1e-3)


def test_clipping_under_muon_is_refused() -> None:
    with pytest.raises(UserError, match=r"grad_clip 1 would clip Muon's update.*set optimizer.grad_clip=0"):
        load_config("tiny", ["optimizer.kind=muon"])
    assert load_config("tiny", ["optimizer.kind=muon", "optimizer.grad_clip=0"]).optimizer.momentum == 0.95
