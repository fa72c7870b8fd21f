"""The model card (README.md) of an exported folder."""

from typing import Any

from fusiontree.config import RunConfig
from fusiontree.model.config import ModelConfig


def _pruned_parts(model: ModelConfig) -> list[tuple[str, str]]:
    """Return rows of the card's table on the pruned layers."""
    layers = range(model.num_layers)
    kinds = {layer: model.kind_at(layer) for layer in layers if model.kind_at(layer) != "hybrid"}
    heads = {layer: model.queries_per_kv * model.kv_heads_at(layer)[0] for layer in layers}
    fewer = {layer: n for layer, n in heads.items() if model.has("attention", layer) and n != model.global_heads}
    parts: dict[str, dict[int, Any]] = {"layers pruned to one branch": kinds, "global heads left": fewer}
    return [(name, ", ".join(f"{i}: {kept}" for i, kept in part.items())) for name, part in parts.items() if part]


def model_card(config: RunConfig, model: ModelConfig, state: dict[str, Any]) -> str:
    """Return the text of the card.

    Args:
        model: configuration of the exported model, after pruning.
        state: facts of the run, with `val_loss` and, if pruned, `pruning`.
    """
    lines = [
        ("updates", f"{state['step']:,}"),
        ("tokens", f"{state['tokens']:,}"),
        ("row length", f"{config.data.seq_len:,} tokens"),
        ("tokens per update", f"{config.batch.tokens:,}"),
        ("peak learning rate", f"{config.optimizer.lr:g}, {config.schedule.kind}"),
        ("precision", config.precision),
        ("sources", ", ".join(filter(None, config.data.locations)) or "one dataset"),
    ]
    if state["val_loss"] is not None:
        name = "held-out loss in training, not pruned" if "pruning" in state else "held-out loss"
        lines.append((name, f"{state['val_loss']:.4f} nats per token"))
    pruned = _pruned_parts(model)
    lines += pruned
    if "pruning" in state:
        before, after = (state["pruning"][when] for when in ("before", "after"))
        lines += [
            ("parameters before pruning", f"{before['parameters']:,}"),
            ("held-out loss before and after", f"{before['loss']:.4f} and {after['loss']:.4f} nats per token"),
        ]
    fused = "added up" if model.fusion == "sum" else f"fused by a learned gate (`{model.fusion}`)"
    note = " Some layers were pruned, as listed below." if pruned else ""
    facts = "\n".join(f"| {name} | {value} |" for name, value in lines)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

A hybrid language model of {model.parameter_count():,} parameters pretrained with FusionTree: {model.num_layers} layers
of width {model.hidden_size}, each a Mamba-2 branch ({model.ssm_heads} heads of {model.ssm_head_dim}, state
{model.ssm_state_size}) in parallel with an attention branch ({model.num_heads} heads of {model.head_dim},
{model.global_heads} of them global, the rest with a window of {model.window} tokens), {fused}.{note}

| | |
|---|---|
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

`parity.json` lists the differences from the trained model, measured by the export.
"""
