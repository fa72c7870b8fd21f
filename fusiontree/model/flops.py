"""Model FLOPs by part of the model. Free of torch.

The count follows the model's definition, not its kernels:

- matrix products: two operations per weight and token, the head included, the embedding lookup excluded;
- attention: 4·D operations per head and visible query-key pair (the score and the weighted value);
- the scan: those of the recurrence, 5·P·S (decay and add two, outer product one, read two) plus 3·P (dt·x, D·x, their
  sum) per head and token. The chunked algorithm executes more operations the larger its chunks are, in exchange for
  running on matrix units; counting these would reward a wasteful chunk size;
- the convolution: two operations per channel, tap and token.

Norms, activations, RoPE and the gated sum are excluded: they take a few operations per value. A backward pass counts
as two forward passes. Recomputed activations are not counted.
"""

from collections.abc import Sequence

from .config import ModelConfig


def update_flops(config: ModelConfig, documents: Sequence[int]) -> dict[str, int]:
    """Count the operations of one forward and backward pass, by part of the model.

    Args:
        config: the model's shape.
        documents: the lengths of all documents in tokens; a run of padding counts as a document.
    """
    return {part: 3 * count for part, count in forward_flops(config, documents).items()}


def forward_flops(config: ModelConfig, documents: Sequence[int]) -> dict[str, int]:
    """Count the operations of one forward pass, by part of the model; arguments as in `update_flops`."""
    tokens, layers = sum(documents), range(config.num_layers)
    per_pair, everything = 4 * config.head_dim, _all_pairs(documents, None)
    heads = [tuple(config.queries_per_kv * kv for kv in config.kv_heads_at(layer)) for layer in layers]
    pairs = {window: _all_pairs(documents, window) for window in {config.window_at(layer) for layer in layers}}
    windowed = sum(heads[layer][1] * pairs[config.window_at(layer)] for layer in layers)
    scans = sum(config.has("mamba", layer) for layer in layers)
    state, values = config.ssm_size * config.ssm_state_size, config.ssm_size
    products = {part: 2 * weights * tokens for part, weights in _matrix_weights(config).items()}
    return {
        **products,
        "attention_global": per_pair * sum(count for count, _ in heads) * everything,
        "attention_windowed": per_pair * windowed,
        "scan": (5 * state + 3 * values) * scans * tokens,
        "convolution": 2 * config.conv_size * config.conv_kernel * scans * tokens,
    }


def six_n_flops(config: ModelConfig, tokens: int) -> int:
    """Estimate one forward and backward pass as 6·N operations per token (arXiv 2001.08361)."""
    return 6 * config.parameter_count() * tokens


def visible_pairs(length: int, window: int | None) -> int:
    """Count the visible query-key pairs in a document of `length` tokens; the window includes the query's own token."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _all_pairs(documents: Sequence[int], window: int | None) -> int:
    return sum(visible_pairs(length, window) for length in documents)


def _matrix_weights(config: ModelConfig) -> dict[str, int]:
    """Count the weights that multiply every token, by part of the model, summed over the layers."""
    H, layers = config.hidden_size, range(config.num_layers)
    kv_heads = sum(sum(config.kv_heads_at(layer)) for layer in layers)
    heads = 2 * (config.queries_per_kv + 1) * kv_heads * config.head_dim  # queries and outputs, keys and values
    scans = sum(config.has("mamba", layer) for layer in layers)
    gates = sum(config.kind_at(layer) == "hybrid" for layer in layers)
    gate = {"channel": 3 * H, "token": 2 * H + 1, "static": 0, "sum": 0}[config.fusion] * config.gate_rank
    encodings = 0 if config.srte != "learned" else 1 if config.srte_shared else scans
    return {
        "attention_projections": H * heads,
        "mamba_projections": H * (config.ssm_projection_size + config.ssm_size) * scans,
        "mlp": 3 * H * config.mlp_size * config.num_layers,
        "gate": gate * gates,
        "time_encoding": config.srte_rank * H * encodings,
        "head": config.vocab_size * H,
    }
