"""The presets: complete, of the sizes in their names, with parameter counts that match the modules."""

from pathlib import Path

import pytest
import torch

from fusiontree.config import deepspeed_json, load_config, preset_names
from fusiontree.doctor import memory
from fusiontree.model.lm import HybridLM

PARAMETERS = {
    "tiny": 5_489_968,
    "125m": 129_739_984,
    "350m": 343_958_016,
    "1b": 1_408_598_400,
    "3b": 3_027_975_776,
    "7b": 7_065_879_552,
    "13b": 12_706_508_928,
}
NAMED = {"tiny": 5.5e6, "125m": 125e6, "350m": 350e6, "1b": 1.41e9, "3b": 3e9, "7b": 7e9, "13b": 13e9}


def test_the_package_includes_these_presets():
    assert preset_names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    count = load_config(name).model.parameter_count()
    assert count == PARAMETERS[name]
    assert abs(count / NAMED[name] - 1) < 0.05


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_formula_counts_the_parameters_of_the_modules(name):
    with torch.device("cpu" if name == "tiny" else "meta"):
        model = HybridLM(load_config(name).model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def row(name):
    """Return a preset's row of the table in the docs."""
    config = load_config(name)
    m, b = config.model, config.batch
    needs = [memory.estimate(config, ranks)["memory_per_rank_bytes"] / 2**30 for ranks in (1, 8, 64)]
    figures = [
        *(f"`{name}`", f"{m.parameter_count() / 1e6:,.0f}", f"{m.num_layers} x {m.hidden_size:,}"),
        *(f"{m.num_heads} / {m.num_kv_heads}; {m.global_heads}", str(m.ssm_heads), f"{config.data.seq_len:,}"),
        *(f"{b.tokens:,}", f"{config.deepspeed}, {config.activation_checkpointing.policy}"),
        " / ".join(f"{gib:,.0f}" for gib in needs),
    ]
    return f"| {' | '.join(figures)} |"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_table_in_the_docs_matches(name):
    assert row(name) in (Path(__file__).parents[1] / "docs" / "training.md").read_text()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_needs_only_a_dataset(name):
    config = load_config(name)
    assert config.name == name
    assert config.data.path is None
    assert "zero_optimization" in deepspeed_json(config)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "tiny"])
def test_large_presets_train_in_bf16_on_long_rows_and_many_ranks(name):
    config = load_config(name)
    assert (config.precision, config.data.seq_len, config.model.vocab_size) == ("bf16", 32_768, 50_432)
    assert config.accumulation_steps(1) == config.accumulation_steps(8) * 8


def test_the_one_billion_preset_has_the_published_shape():
    model = load_config("1b").model
    shape = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim)
    assert shape == (18, 2048, 16, 4, 128)
    assert (model.global_heads, model.window, model.mlp_size, model.gate_rank) == (4, 1024, 5632, 256)
    assert (model.ssm_heads, model.ssm_head_dim, model.ssm_state_size) == (64, 64, 128)
    assert model.tie_embeddings


def test_the_tiny_preset_suits_the_demo():
    config = load_config("tiny")
    assert (config.data.seq_len, config.precision, config.deepspeed) == (1024, "fp32", "zero2")
    assert config.activation_checkpointing.policy == "full"
    assert config.accumulation_steps(2) > 1
