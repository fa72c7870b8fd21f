"""Sizes, initialization and precision of the model; every field of its configuration has an effect."""

import dataclasses
import math

import pytest
import torch
from conftest import SMALL, build

from fusiontree.model import kernel_registry
from fusiontree.model.attention import rotary_embedding
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.model.pointwise import rotate

CHANGES = [
    {"vocab_size": 97},
    {"hidden_size": 40},
    {"num_layers": 2},
    {"mlp_size": 40},
    {"num_heads": 2},
    {"num_kv_heads": 4},
    {"head_dim": 4},
    {"global_heads": 4},
    {"window": 8},
    {"window_schedule": "pyramid"},
    {"rope_base": 100.0},
    {"ssm_heads": 6},
    {"ssm_head_dim": 4},
    {"ssm_state_size": 4},
    {"ssm_groups": 1},
    {"conv_kernel": 3},
    {"fusion": "static"},
    {"gate_rank": 4},
    {"srte": "none"},
    {"srte": "learned"},
    {"norm_eps": 1e-1},
    {"tie_embeddings": False},
    {"layer_kinds": ("mamba", "hybrid", "attention")},
    {"layer_global_heads": (2, 0, 2)},
]


def test_every_field_that_affects_the_output_is_covered() -> None:
    changed = {key for change in CHANGES for key in change}
    elsewhere = {"chunk_size", "branch_drop", "srte_rank", "srte_shared", "max_positions"}
    assert changed | elsewhere == {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(map(str, *change.items())))
def test_a_changed_field_changes_the_logits(change: dict) -> None:
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    before, after = build()(ids).logits, build(**change)(ids).logits
    assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-4)


def test_chunk_size_reaches_the_scan() -> None:
    kernels, sizes = kernel_registry.select(), []

    def scan(*args: object, chunk_size: int, **options: object) -> object:
        sizes.append(chunk_size)
        return kernels.scan(*args, chunk_size=chunk_size, **options)

    build(kernels=dataclasses.replace(kernels, scan=scan), chunk_size=8)(torch.zeros(1, 20, dtype=torch.int64))
    assert sizes == [8] * 3


def test_fields_of_the_learned_time_encoding_reach_its_table() -> None:
    shared = build(srte="learned", srte_rank=5, max_positions=60)
    assert shared.srte.table.shape == (60, 5)
    own = build(srte="learned", srte_shared=False)
    assert own.srte is None
    assert len({id(block.srte.table) for block in own.blocks}) == 3


@pytest.mark.parametrize(
    "change",
    [{}, {"fusion": "token"}, {"fusion": "static"}, {"fusion": "sum"}, {"tie_embeddings": False}, {"srte": "learned"},
     {"srte": "learned", "srte_shared": False}, {"ssm_groups": 1, "conv_kernel": 3},
     {"layer_kinds": ("mamba", "hybrid", "attention"), "srte": "learned", "srte_shared": False},
     {"layer_global_heads": (2, 0, 2)}],
)  # fmt: skip
def test_the_parameter_formula_equals_the_count_over_modules(change: dict) -> None:
    model = build(**change)
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count()


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    config = dataclasses.replace(SMALL, vocab_size=8192, hidden_size=256)
    torch.manual_seed(0)
    model, ids = HybridLM(config), torch.randint(8192, (8, 128))
    with torch.no_grad():
        loss = model(ids, labels=ids.roll(-1, 1)).loss_sum / ids.numel()
    assert loss == pytest.approx(math.log(8192), rel=0.02)
    assert loss == pytest.approx(math.log(8192) + 0.5**2 / 2, rel=0.005)  # the standard deviation of logits is 0.5


def test_the_scale_of_activations_does_not_grow_with_depth() -> None:
    torch.manual_seed(0)
    scales = []
    for layers in (6, 48):
        model = HybridLM(dataclasses.replace(SMALL, hidden_size=64, num_layers=layers))
        seen: list[torch.Tensor] = []
        model.norm.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(torch.randint(96, (2, 64)))
        scales.append(seen[0].square().mean().sqrt().item())
    assert scales[1] < 2 * scales[0]


def test_scan_parameters_are_initialized_as_in_mamba2() -> None:
    mamba = build(ssm_heads=64, ssm_groups=1).blocks[0].mamba
    decay, dt = mamba.A_log.exp(), torch.nn.functional.softplus(mamba.dt_bias)
    assert 1 <= decay.min() < 3
    assert 14 < decay.max() <= 16
    assert 0.00099 < dt.min() < 0.003
    assert 0.03 < dt.max() < 0.101
    assert 0.005 < dt.median() < 0.02  # log-uniform


@pytest.mark.parametrize(
    "change",
    [*({"fusion": kind} for kind in ("channel", "token", "static", "sum")),
     {"layer_kinds": ("mamba", "hybrid", "attention")}],
)  # fmt: skip
def test_activations_are_in_the_compute_dtype_from_end_to_end(change: dict) -> None:
    model = build(srte="learned", dtype=torch.bfloat16, **change)
    kinds: set[tuple[str, torch.dtype]] = set()

    def record(module: torch.nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output  # a block returns (stream, gate)
        if torch.is_tensor(first) and module not in (model.embedding, model):
            kinds.add((type(module).__name__, first.dtype))

    for module in model.modules():
        module.register_forward_hook(record)
    ids, cache = torch.randint(96, (1, 40)), model.new_cache(1)
    for part in (ids, ids[:, :1]):
        model(part, cache=cache)
    model(ids, labels=ids)
    assert {dtype for _, dtype in kinds} == {torch.bfloat16}
    expected = {"LearnedTimeEncoding", "MambaBranch", "AttentionBranch", "SwiGLU", "RMSNorm", "HybridBlock"}
    assert expected <= {name for name, _ in kinds}


def test_inconsistent_fields_are_rejected_by_name() -> None:
    for change, words in [
        ({"num_heads": 5}, ("num_heads 5", "num_kv_heads 2")),
        ({"global_heads": 1}, ("global_heads 1", "num_heads / num_kv_heads = 2")),
        ({"ssm_groups": 3}, ("ssm_heads 4", "ssm_groups 3")),
        ({"head_dim": 7}, ("head_dim 7",)),
        ({"window": 20, "window_schedule": "pyramid"}, ("window 20",)),
        ({"branch_drop": 1.0}, ("branch_drop 1.0",)),
        ({"norm_eps": -1.0}, ("norm_eps is -1.0",)),
        ({"rope_base": 0.0}, ("rope_base is 0.0",)),
        ({"num_layers": 0}, ("num_layers is 0",)),
        ({"layer_kinds": ("mamba",)}, ("layer_kinds has 1 entries", "num_layers 3")),
        ({"layer_global_heads": (2, 1, 2)}, ("layer_global_heads has 1 for layer 1", "global_heads 2")),
        ({"global_heads": 4, "layer_global_heads": (0, 4, 4)}, ("layer_global_heads has 0", "leave the layer a head")),
    ]:
        with pytest.raises(ValueError, match="must|not a multiple|entries") as caught:
            dataclasses.replace(SMALL, **change)
        assert all(word in str(caught.value) for word in words)


def test_pyramid_windows_grow_with_depth() -> None:
    config = dataclasses.replace(SMALL, num_layers=8, window=64, window_schedule="pyramid")
    assert [config.window_at(layer) for layer in range(8)] == [8, 8, 16, 16, 32, 32, 64, 64]


def test_kernels_are_chosen_by_name_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernels.scan 'warp' is unknown; choose auto or one of mamba_ssm, reference"):
        kernel_registry.select({"scan": "warp"})
    monkeypatch.setenv("FUSIONTREE_ATTENTION", "warp")
    with pytest.raises(ValueError, match="kernels.attention 'warp' is unknown"):
        kernel_registry.select()


def test_rotary_positions_keep_lengths_and_make_products_relative() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotary_embedding(torch.tensor([[position]]), 8, 100.0)).flatten()

    torch.testing.assert_close(rotated(q, 50).norm(), q.norm())
    product = rotated(q, 13) @ rotated(k, 5)
    torch.testing.assert_close(rotated(q, 108) @ rotated(k, 100), product, rtol=1e-4, atol=1e-4)
    assert abs(rotated(q, 14) @ rotated(k, 5) - product) > 1e-3
