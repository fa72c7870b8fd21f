"""Estimates of a run's memory per rank and of its disk space; formulas in docs/launching.md. Free of torch."""

import math
from typing import Any

from fusiontree.config import CheckpointingConfig, RunConfig, deepspeed_json
from fusiontree.model.config import ModelConfig

# bytes per parameter, all fp32: Adam has two moments, and ZeRO's optimizer keeps a flat copy of the weights
_STATE_BYTES = {"weights": 4, "gradients": 4, "moments": 8}
_COPY_BYTES = 4
_PROCESS_BYTES = 600 * 2**20  # a rank without a model: the interpreter with torch and DeepSpeed
_SAVED_BYTES = 16  # per parameter of a checkpoint: weights, the optimizer's copy, both moments
STAGES = (0, 1, 2, 3)


def estimate(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the peak memory of one of `ranks` ranks, in bytes.

    Raises:
        UserError: the DeepSpeed settings are invalid.
    """
    zero = deepspeed_json(config).get("zero_optimization", {})
    state = state_bytes(config.model.parameter_count(), zero, ranks)
    activations = activation_bytes(config)
    return {
        "state_bytes": state,
        "activation_bytes": activations,
        "memory_per_rank_bytes": state + activations + _PROCESS_BYTES,
    }


def table(config: RunConfig, ranks: int) -> dict[str, dict[str, float]]:
    """Return the peak memory of one of `ranks` ranks in GiB, by ZeRO stage and by recomputation policy."""
    parameters = config.model.parameter_count()
    rows = {}
    for stage in STAGES:
        state = state_bytes(parameters, {"stage": stage}, ranks)
        rows[f"zero{stage}"] = {
            policy: round((state + activation_bytes(_with_policy(config, policy)) + _PROCESS_BYTES) / 2**30, 1)
            for policy in ("none", "full")
        }
    return rows


def _with_policy(config: RunConfig, policy: str) -> RunConfig:
    return config.model_copy(update={"activation_checkpointing": CheckpointingConfig(policy=policy)})  # type: ignore[arg-type]


def state_bytes(parameters: int, zero: dict[str, Any], ranks: int) -> int:
    """Return the bytes of one rank's weights, gradients, moments and weight copy.

    ZeRO-1 partitions the moments and the copy, ZeRO-2 also the gradients, ZeRO-3 also the weights.

    Args:
        zero: DeepSpeed's ``zero_optimization``.
    """
    stage = zero.get("stage", 0)
    partitioned = ("moments", "gradients", "weights")[:stage]
    per_parameter = {name: size / (ranks if name in partitioned else 1) for name, size in _STATE_BYTES.items()}
    per_parameter["copy"] = _COPY_BYTES / ranks if stage else 0
    if "offload_optimizer" in zero:
        per_parameter["moments"] = per_parameter["copy"] = 0
    return math.ceil(parameters * sum(per_parameter.values()))


def activation_bytes(config: RunConfig) -> int:
    """Return the bytes that one forward pass saves for the backward pass, plus the largest block to recompute."""
    model, tokens = config.model, config.data.seq_len * config.batch.micro_rows
    item = 4 if config.precision == "fp32" else 2
    full = [_block_width(model, layer) * item for layer in range(model.num_layers)]
    kept = [_kept_bytes(config, layer, item) for layer in range(model.num_layers)]
    # the backward pass recomputes one block at a time, and then has its saved values complete
    return tokens * (sum(kept) + max(block - saved for block, saved in zip(full, kept, strict=True)))


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of one checkpoint on disk."""
    return _SAVED_BYTES * config.model.parameter_count()


def disk_bytes(config: RunConfig) -> int:
    """Return the most bytes that the run's checkpoints occupy: all kept ones, and one being written."""
    kept = config.checkpoint.keep_last
    permanent = config.schedule.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return checkpoint_bytes(config) * (kept + permanent + 1)


def _kept_bytes(config: RunConfig, layer: int, item: int) -> int:
    """Return the bytes per token that block `layer` saves for the backward pass, at `item` bytes per value."""
    model, chosen = config.model, config.activation_checkpointing
    kept = 0 if chosen.offload else item * model.hidden_size  # a recomputed part saves only its input
    if chosen.policy == "full" or (chosen.policy == "every_n" and layer % chosen.every == 0):
        return kept
    block = _block_width(model, layer) * item
    if chosen.policy != "branch":
        return block
    widths = {"mamba": _mamba_width(model, layer), "attention": _attention_width(model, layer)}
    recomputed = widths if chosen.branch == "both" else [chosen.branch]
    return block + sum(kept - widths[branch] * item for branch in recomputed if widths[branch])


def _block_width(model: ModelConfig, layer: int) -> int:
    """Return the values per token that one block saves: its branches, the MLP, the residual sums."""
    branches = _mamba_width(model, layer) + _attention_width(model, layer)
    return branches + 4 * model.mlp_size + 2 * model.hidden_size


def _mamba_width(model: ModelConfig, layer: int) -> int:
    """Return the values per token of the Mamba branch: projection, convolution and scan; norms, output and gate."""
    return 2 * model.ssm_projection_size + 5 * model.hidden_size if model.has("mamba", layer) else 0


def _attention_width(model: ModelConfig, layer: int) -> int:
    """Return the values per token of attention: Q and K before and after norm and rotation; norms, output, gate."""
    projected = 2 * (model.queries_per_kv + 1) * sum(model.kv_heads_at(layer)) * model.head_dim
    return projected + 5 * model.hidden_size if model.has("attention", layer) else 0
