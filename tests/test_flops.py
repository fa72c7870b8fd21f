"""FLOP counts equal those of the model: pairs by brute force, matrix products by torch's counter."""

import dataclasses

import pytest
import torch
from conftest import SMALL, build, documents_of
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.config import load_config
from fusiontree.device import utilization
from fusiontree.model.config import ModelConfig
from fusiontree.model.flops import forward_flops, six_n_flops, update_flops, visible_pairs

ROWS = [[40, 8], [20, 28]]
LENGTHS = [length for row in ROWS for length in row]
NOT_PRODUCTS = {"attention_global", "attention_windowed", "scan", "convolution"}


def counted_products(config: ModelConfig, backward: bool) -> int:
    """Count the operations of matrix products outside the kernels in a real forward (and backward) pass."""
    model = build(**dataclasses.asdict(config))
    ids = torch.zeros(2, sum(ROWS[0]), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, documents_of(ROWS)).logits
        if backward:
            logits.sum().backward()
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 100])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 31])
def test_visible_pairs_equal_those_of_the_mask(length: int, window: int | None) -> None:
    seen = sum(k <= q and (window is None or q - k < window) for q in range(length) for k in range(length))
    assert visible_pairs(length, window) == seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "token", "tie_embeddings": False},
        {"fusion": "static", "srte": "learned"},
        {"fusion": "sum", "srte": "learned", "srte_shared": False},
        {"layer_kinds": ("mamba", "attention", "hybrid"), "layer_global_heads": (2, 2, 0)},
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_matrix_products_equal_those_counted_by_torch(changes: dict, backward: bool) -> None:
    config = dataclasses.replace(SMALL, **changes)
    parts = (update_flops if backward else forward_flops)(config, LENGTHS)
    products = sum(count for part, count in parts.items() if part not in NOT_PRODUCTS)
    assert products == counted_products(config, backward)


def test_attention_counts_the_window_of_each_layer_and_both_kinds_of_head() -> None:
    config = dataclasses.replace(SMALL, num_layers=4, window_schedule="pyramid")
    parts = forward_flops(config, LENGTHS)
    per_pair = 2 * config.head_dim * 2
    windowed = sum(visible_pairs(length, window) for length in LENGTHS for window in (2, 4, 8, 16))
    assert parts["attention_windowed"] == per_pair * 2 * windowed
    assert parts["attention_global"] == per_pair * 2 * 4 * sum(n * (n + 1) // 2 for n in LENGTHS)


def test_a_pruned_branch_costs_nothing() -> None:
    full = forward_flops(SMALL, LENGTHS)
    pruned = forward_flops(dataclasses.replace(SMALL, layer_kinds=("mamba", "attention", "hybrid")), LENGTHS)
    for part in ("attention_global", "attention_windowed", "attention_projections", "scan", "mamba_projections"):
        assert 3 * pruned[part] == 2 * full[part]
    assert 3 * pruned["gate"] == full["gate"]


def test_scan_and_convolution_follow_their_formulas() -> None:
    parts = forward_flops(SMALL, [10])
    H, P, S, layers = SMALL.ssm_heads, SMALL.ssm_head_dim, SMALL.ssm_state_size, SMALL.num_layers
    assert parts["scan"] == layers * 10 * H * (5 * P * S + 3 * P)
    assert parts["convolution"] == layers * 10 * (H * P + 2 * SMALL.ssm_groups * S) * 2 * SMALL.conv_kernel


def test_only_global_attention_depends_on_document_lengths_beyond_the_window() -> None:
    config = load_config("1b").model
    one, two = update_flops(config, [32_768]), update_flops(config, [16_384] * 2)
    differing = {part for part in one if one[part] != two[part]}
    assert differing == {"attention_global", "attention_windowed"}
    assert one["attention_global"] > 1.99 * two["attention_global"]
    assert one["attention_windowed"] < 1.02 * two["attention_windowed"]


def test_six_n_counts_every_parameter() -> None:
    assert six_n_flops(SMALL, 7) == 42 * sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(
    ("device", "peak"), [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA GB200", 2500)]
)
def test_utilization_is_relative_to_the_peak_if_known(device: str, peak: float) -> None:
    assert utilization(400e12, device) == {"tflop_per_s": 400, "mfu": pytest.approx(400 / peak)}
    assert utilization(2e9, "CPU") == {"tflop_per_s": 0.002}
