"""Pruning plans: selection of branches and heads by gates or by held-out loss, and the pruned weights.

The mean gate g of a pruned layer is folded into the output projection of the branch that stays: its rows are scaled by
2·g for Mamba and by 2·(1 − g) for attention, the factors of the fusion. The branch then adds to the residual stream, on
average, as much as it added through its gate.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fusiontree.errors import UserError, short_cause
from fusiontree.files import parse_json
from fusiontree.model.cache import Cache
from fusiontree.model.config import LayerKind, ModelConfig
from fusiontree.model.kernel_registry import Kernels
from fusiontree.model.lm import HybridLM

KINDS = get_args(LayerKind)
_CHANGED = re.compile(r"blocks\.(\d+)\.(mamba|attention)\.(.+)")  # weights that pruning may change


@dataclass(frozen=True)
class Pruning:
    """Branches and global heads that every layer keeps."""

    kinds: tuple[LayerKind, ...]
    groups: tuple[tuple[int, ...], ...]  # global key-value heads, with their queries; empty without attention

    @classmethod
    def none(cls, config: ModelConfig) -> "Pruning":
        """Return the pruning that keeps everything."""
        layers = range(config.num_layers)
        kinds = tuple(config.kind_at(layer) for layer in layers)
        return cls(kinds, tuple(tuple(range(config.kv_heads_at(layer)[0])) for layer in layers))

    def replace(self, layer: int, kind: LayerKind | None = None, groups: tuple[int, ...] | None = None) -> "Pruning":
        """Return a copy with one layer changed."""
        kinds, all_groups = list(self.kinds), list(self.groups)
        kinds[layer] = kind or kinds[layer]
        all_groups[layer] = groups if groups is not None else all_groups[layer]
        if kinds[layer] == "mamba":
            all_groups[layer] = ()
        return Pruning(tuple(kinds), tuple(all_groups))

    def to_plan(self) -> dict[str, Any]:
        """Return the pruning as a plan for `read_plan`."""
        kept = zip(self.kinds, self.groups, strict=True)
        return {
            "layers": [
                {"layer": i, "keep": kind, "global_groups": list(groups)} for i, (kind, groups) in enumerate(kept)
            ]
        }

    def apply(self, config: ModelConfig) -> ModelConfig:
        """Return the pruned configuration of a model of `config`."""
        kinds = None if set(self.kinds) == {"hybrid"} else self.kinds
        heads: tuple[int, ...] | None = tuple(
            config.global_heads if kind == "mamba" else config.queries_per_kv * len(groups)
            for kind, groups in zip(self.kinds, self.groups, strict=True)
        )
        if set(heads or ()) == {config.global_heads}:
            heads = None
        return dataclasses.replace(config, layer_kinds=kinds, layer_global_heads=heads)


class PrunedWeights(Mapping[str, Tensor]):
    """Weights of the pruned model, each computed from the unpruned weights on access."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig, pruning: Pruning, gates: Tensor):
        """Take the unpruned weights, and mean gates by layer and channel, fp32 [layers, H]; 1 is all Mamba."""
        self.weights, self.config, self.pruning, self.gates = weights, config, pruning, gates
        with torch.device("meta"):
            self.names = [name for name, _ in HybridLM(pruning.apply(config)).named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        found = _CHANGED.fullmatch(name)
        if found is None:
            return value
        layer, branch, part = int(found[1]), found[2], found[3]
        if branch == "attention" and self.pruning.groups[layer] != Pruning.none(self.config).groups[layer]:
            value = self._select_heads(value, part, layer)
        if part == "out_proj.weight" and self.config.kind_at(layer) == "hybrid" and self.pruning.kinds[layer] == branch:
            gate = self.gates[layer] if branch == "mamba" else 1 - self.gates[layer]
            value = (value * (2 * gate)[:, None]).to(value.dtype)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _select_heads(self, value: Tensor, part: str, layer: int) -> Tensor:
        """Return the slices of an attention weight that belong to the heads that stay.

        `qkv_proj` has the rows of all queries, then of all keys, then of all values; within each, the global key-value
        heads come before the windowed ones, which always stay.
        """
        D, queries = self.config.head_dim, self.config.queries_per_kv
        global_kv, windowed = self.config.kv_heads_at(layer)
        K = global_kv + windowed
        kv = [*self.pruning.groups[layer], *range(global_kv, K)]
        q = [queries * head + i for head in kv for i in range(queries)]
        if part == "qkv_proj.weight":
            rows = [*q, *(queries * K + head for head in kv), *((queries + 1) * K + head for head in kv)]
            return value.unflatten(0, (-1, D))[rows].flatten(0, 1)
        if part == "out_proj.weight":
            return value.unflatten(1, (-1, D))[:, q].flatten(1)
        return value.unflatten(0, (-1, D))[q].flatten() if part == "norm" else value


def pruned_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    pruning: Pruning,
    gates: Tensor,
    kernels: Kernels | None = None,
    compute_dtype: torch.dtype | None = None,
) -> HybridLM:
    """Build the pruned model in memory; unchanged tensors are shared with `weights`."""
    with torch.device("meta"):
        model = HybridLM(pruning.apply(config), kernels, compute_dtype=compute_dtype)
    model.load_state_dict(dict(PrunedWeights(weights, config, pruning, gates)), strict=True, assign=True)
    return model.eval()


# --- plans -----------------------------------------------------------------------------------------------------------


def make_plan(config: ModelConfig, gates: Tensor, hi: float, lo: float, tokens: int) -> dict[str, Any]:
    """Return the pruning plan that the gates suggest, for review and for `export --prune`.

    A layer whose mean gate is above `hi` keeps only Mamba, below `lo` only attention. Its confidence is the share of
    channels whose mean gate is on the same side; for a layer that keeps both branches, the share between the bounds.

    Args:
        gates: fp32 [layers, H], mean by layer and channel.
        tokens: row length for which the saved bytes of a bf16 cache are reported.
    """
    if not 0 <= lo < hi <= 1:
        raise UserError(f"--hi is {hi} and --lo {lo}; both must be from 0 to 1, and hi must be above lo")
    layers = []
    unpruned = Pruning.none(config)
    for layer in range(config.num_layers):
        mean = float(gates[layer].mean())
        sides: dict[LayerKind, Tensor] = {"mamba": gates[layer] > hi, "attention": gates[layer] < lo}
        sides["hybrid"] = ~(sides["mamba"] | sides["attention"])
        keep: LayerKind = config.kind_at(layer)
        if keep == "hybrid":
            keep = "mamba" if mean > hi else "attention" if mean < lo else "hybrid"
        pruning = unpruned.replace(layer, keep)
        layers.append(
            {
                "layer": layer,
                "keep": keep,
                "gate_mean": round(mean, 4),
                "confidence": round(float(sides[keep].float().mean()), 4),
                "global_groups": list(pruning.groups[layer]),
                "saves": savings(config, pruning, tokens),
            }
        )
    return {"hi": hi, "lo": lo, "layers": layers}


def savings(config: ModelConfig, pruning: Pruning, tokens: int) -> dict[str, int]:
    """Return the parameters, and the bytes of a bf16 cache for one row of `tokens` tokens, that `pruning` removes."""
    pruned = pruning.apply(config)
    return {
        "parameters": config.parameter_count() - pruned.parameter_count(),
        "cache_bytes": cache_bytes(config, tokens) - cache_bytes(pruned, tokens),
    }


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of the bf16 cache of all layers for one row of `tokens` tokens."""
    cache = Cache(config, 1, torch.bfloat16, "meta")
    cache.reserve(tokens)
    return cache.nbytes


def read_plan(path: Path, config: ModelConfig) -> Pruning:
    """Read the pruning from a plan's `layer`, `keep` and `global_groups`; layers not in the plan are not pruned.

    Raises:
        UserError: the file is not a plan, has an unknown layer or head, or leaves a layer no branch.
    """
    try:
        plan = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"no plan at {path}; create one with `fusiontree prune RUN --out {path}`") from None
    except ValueError as error:
        raise _not_a_plan(path, error) from None
    try:
        return parse_plan(plan, config, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_a_plan(path, error) from None


def _not_a_plan(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a pruning plan ({short_cause(error)}); create one with `fusiontree prune`")


def parse_plan(plan: Mapping[str, Any], config: ModelConfig, path: object) -> Pruning:
    """Return the pruning of a plan in the format of `make_plan`; errors as in `read_plan`, with `path` as the file."""
    entries = [(entry["layer"], entry.get("keep"), entry.get("global_groups")) for entry in plan["layers"]]
    if not entries:
        raise UserError(f"{path} has no layers; create a plan with `fusiontree prune`")
    pruning, seen = Pruning.none(config), set()
    for layer, keep, groups in entries:
        if type(layer) is not int or not 0 <= layer < config.num_layers:
            raise UserError(f"{path}: layer {layer!r} is unknown; the model's layers are 0 to {config.num_layers - 1}")
        if layer in seen:
            raise UserError(f"{path}: layer {layer} appears twice; remove one")
        seen.add(layer)
        pruning = _parse_layer(path, config, pruning, layer, keep, groups)
    return pruning


def _parse_layer(path: object, config: ModelConfig, pruning: Pruning, layer: int, keep: Any, groups: Any) -> Pruning:
    if keep not in KINDS:
        raise UserError(f"{path}: layer {layer}: keep is {keep!r}; it must be mamba, attention or hybrid (both)")
    if config.kind_at(layer) not in ("hybrid", keep):
        raise UserError(f"{path}: layer {layer} has only {config.kind_at(layer)}, so it cannot keep {keep}")
    global_kv, windowed = config.kv_heads_at(layer)
    if keep == "mamba" or groups is None:
        return pruning.replace(layer, keep)
    if (
        not isinstance(groups, list)
        or groups != [g for g in range(global_kv) if g in groups]
        or not all(type(g) is int for g in groups)
    ):
        raise UserError(
            f"{path}: layer {layer}: global_groups is {groups}; it must list heads from 0 to {global_kv - 1} in order"
        )
    if not groups and not windowed:
        raise UserError(
            f"{path}: layer {layer}: global_groups is empty, and the layer has no other heads; list at least one"
        )
    return pruning.replace(layer, keep, tuple(groups))


# --- selection by held-out loss ---------------------------------------------------------------------------------------


def branch_candidates(config: ModelConfig) -> dict[str, Pruning]:
    """Return every prunable branch by its displayed name, with the pruning that removes only it."""
    unpruned = Pruning.none(config)
    hybrids = [layer for layer in range(config.num_layers) if config.kind_at(layer) == "hybrid"]
    keeps: dict[str, LayerKind] = {"attention": "mamba", "mamba": "attention"}
    return {f"{removed} of layer {i}": unpruned.replace(i, keep) for i in hybrids for removed, keep in keeps.items()}


def head_candidates(config: ModelConfig) -> dict[str, Pruning]:
    """Return every prunable global key-value head by its displayed name, with the pruning that removes only it."""
    unpruned, candidates = Pruning.none(config), {}
    for layer, groups in enumerate(unpruned.groups):
        for removed in groups if len(groups) + config.kv_heads_at(layer)[1] > 1 else ():
            kept = tuple(group for group in groups if group != removed)
            candidates[f"global head group {removed} of layer {layer}"] = unpruned.replace(layer, groups=kept)
    return candidates


def select_cheapest(
    candidates: Mapping[str, Pruning], count: int, config: ModelConfig, loss: Callable[[str, Pruning], float]
) -> tuple[Pruning, dict[str, float]]:
    """Measure each candidate alone and combine the `count` with the lowest loss.

    A candidate that would leave a layer no branch is skipped.

    Returns:
        The combined pruning, and the loss of each candidate in ascending order.

    Raises:
        UserError: fewer than `count` can be removed together, or `count` is below 1.
    """
    if not 1 <= count <= len(candidates):
        raise UserError(
            f"cannot prune {count} of this model's {len(candidates)} candidates; give 1 to {len(candidates)}"
        )
    measured = {name: loss(name, pruning) for name, pruning in candidates.items()}
    combined, taken = Pruning.none(config), 0
    for name in sorted(measured, key=measured.__getitem__):
        merged = _merge(combined, candidates[name], config)
        if merged is not None and taken < count:
            combined, taken = merged, taken + 1
    if taken < count:
        raise UserError(f"cannot prune {count}: every layer must keep a branch, so at most {taken} can be removed")
    return combined, dict(sorted(measured.items(), key=lambda item: item[1]))


def _merge(one: Pruning, other: Pruning, config: ModelConfig) -> Pruning | None:
    """Return the pruning that removes the parts of both; None if a layer would keep no branch."""
    for layer in range(config.num_layers):
        kinds = {one.kinds[layer], other.kinds[layer]} - {"hybrid"}
        groups = tuple(sorted(set(one.groups[layer]) & set(other.groups[layer])))
        if len(kinds) > 1:
            return None
        kind: LayerKind = kinds.pop() if kinds else "hybrid"
        if kind != "mamba" and len(groups) + config.kv_heads_at(layer)[1] == 0:
            return None
        one = one.replace(layer, kind, groups)
    return one
