"""How much memory a run needs on each rank, and how much disk: the formulas of docs/launching.md. Free of torch."""

import math
from typing import Any

from fusiontree.config import CheckpointingConfig, RunConfig, deepspeed_json
from fusiontree.model.config import ModelConfig

# bytes per parameter, all in fp32; Adam has two moments, and ZeRO's optimizer a flat copy of the weights
_STATE_BYTES = {"weights": 4, "gradients": 4, "moments": 8}
_COPY_BYTES = 4
_PROCESS_BYTES = 600 * 2**20  # a rank before its model: the interpreter with torch and DeepSpeed
_SAVED_BYTES = 16  # per parameter in a checkpoint: weights, the optimizer's copy of them, both moments
STAGES = (0, 1, 2, 3)


def estimate(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Memory that one of `ranks` ranks needs at its peak, in bytes.

    Raises:
        UserError: the DeepSpeed settings cannot be read.
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
    """Peak memory of one of `ranks` ranks in GiB, by ZeRO stage and by what is computed again."""
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
    """Weights, gradients, moments and copy of one rank; ZeRO shares out the moments, then gradients, then weights.

    Args:
        zero: DeepSpeed's ``zero_optimization``.
    """
    stage = zero.get("stage", 0)
    shared = ("moments", "gradients", "weights")[:stage]
    per_parameter = {what: size / (ranks if what in shared else 1) for what, size in _STATE_BYTES.items()}
    per_parameter["copy"] = _COPY_BYTES / ranks if stage else 0
    if "offload_optimizer" in zero:
        per_parameter["moments"] = per_parameter["copy"] = 0
    return math.ceil(parameters * sum(per_parameter.values()))


def activation_bytes(config: RunConfig) -> int:
    """What one forward pass keeps for the backward pass, and the block that is computed again, if any is."""
    model, tokens = config.model, config.data.seq_len * config.batch.micro_rows
    item = 2 if config.precision == "bf16" else 4
    whole = [_block_width(model, layer) * item for layer in range(model.num_layers)]
    kept = [_kept_bytes(config, layer, item) for layer in range(model.num_layers)]
    return tokens * (sum(kept) + max(block - left for block, left in zip(whole, kept, strict=True)))


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes that one checkpoint takes on disk."""
    return _SAVED_BYTES * config.model.parameter_count()


def disk_bytes(config: RunConfig) -> int:
    """Bytes that the run's checkpoints take at most: those that stay, and the one that is being written."""
    kept = config.checkpoint.keep_last
    for_ever = config.schedule.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return checkpoint_bytes(config) * (kept + for_ever + 1)


def _kept_bytes(config: RunConfig, layer: int, item: int) -> int:
    """Bytes per token that block `layer` keeps for the backward pass, of `item` bytes a value."""
    model, chosen = config.model, config.activation_checkpointing
    kept = 0 if chosen.offload else item * model.hidden_size  # of a part that is computed again: its input
    if chosen.policy == "full" or (chosen.policy == "every_n" and layer % chosen.every == 0):
        return kept
    block = _block_width(model, layer) * item
    if chosen.policy != "branch":
        return block
    widths = {"mamba": _mamba_width(model, layer), "attention": _attention_width(model, layer)}
    again = widths if chosen.branch == "both" else [chosen.branch]
    return block + sum(kept - widths[branch] * item for branch in again if widths[branch])


def _block_width(model: ModelConfig, layer: int) -> int:
    """Values per token that one block keeps: its branches', the MLP's, the residual sums."""
    branches = _mamba_width(model, layer) + _attention_width(model, layer)
    return branches + 4 * model.mlp_size + 2 * model.hidden_size


def _mamba_width(model: ModelConfig, layer: int) -> int:
    """Its projection and what scan and convolution make of it; norms, output, and what the gate makes of that."""
    return 2 * model.ssm_projection_size + 5 * model.hidden_size if model.has("mamba", layer) else 0


def _attention_width(model: ModelConfig, layer: int) -> int:
    """Queries and keys before and behind norm and rotation; the rest as for Mamba."""
    projected = 2 * (model.queries_per_kv + 1) * sum(model.kv_heads_at(layer)) * model.head_dim
    return projected + 5 * model.hidden_size if model.has("attention", layer) else 0
