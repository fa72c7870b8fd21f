"""Which branches a trained model can do without: a plan to read and edit, and the weights that are left.

A pruned layer's mean gate is folded into the output projection of the branch that stays: 2·g of Mamba's rows, 2·(1 − g)
of attention's. So on average the branch adds to the stream what it added behind its gate.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fusiontree.errors import UserError
from fusiontree.files import parse_json
from fusiontree.model.cache import Cache, LayerCache
from fusiontree.model.config import LayerKind, ModelConfig
from fusiontree.model.kernel_registry import Kernels
from fusiontree.model.lm import HybridLM

KINDS = get_args(LayerKind)
_CHANGED = re.compile(r"blocks\.(\d+)\.(mamba|attention)\.(.+)")  # weights that pruning may change


@dataclass(frozen=True)
class Pruning:
    """What stays of every layer."""

    kinds: tuple[LayerKind, ...]
    groups: tuple[tuple[int, ...], ...]  # global key-value heads, with their queries; none where there is no attention

    @classmethod
    def none(cls, config: ModelConfig) -> "Pruning":
        """Everything stays."""
        layers = range(config.num_layers)
        kinds = tuple(config.kind_at(layer) for layer in layers)
        return cls(kinds, tuple(tuple(range(config.kv_heads_at(layer)[0])) for layer in layers))

    def replace(self, layer: int, kind: LayerKind | None = None, groups: tuple[int, ...] | None = None) -> "Pruning":
        """The same but for one layer."""
        kinds, all_groups = list(self.kinds), list(self.groups)
        kinds[layer] = kind or kinds[layer]
        all_groups[layer] = groups if groups is not None else all_groups[layer]
        if kinds[layer] == "mamba":
            all_groups[layer] = ()
        return Pruning(tuple(kinds), tuple(all_groups))

    def plan(self) -> dict[str, Any]:
        """The plan that says so, for `read_plan`."""
        kept = zip(self.kinds, self.groups, strict=True)
        return {
            "layers": [
                {"layer": i, "keep": kind, "global_groups": list(groups)} for i, (kind, groups) in enumerate(kept)
            ]
        }

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The shape that is left of `whole`."""
        kinds = None if set(self.kinds) == {"hybrid"} else self.kinds
        heads: tuple[int, ...] | None = tuple(
            whole.global_heads if kind == "mamba" else whole.queries_per_kv * len(groups)
            for kind, groups in zip(self.kinds, self.groups, strict=True)
        )
        if set(heads or ()) == {whole.global_heads}:
            heads = None
        return dataclasses.replace(whole, layer_kinds=kinds, layer_global_heads=heads)


class PrunedWeights(Mapping[str, Tensor]):
    """The weights that `pruning` leaves, each made from the whole model's when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig, pruning: Pruning, gates: Tensor):
        """`gates`: mean by layer and channel, fp32 [layers, H]; 1 is all Mamba."""
        self.weights, self.whole, self.pruning, self.gates = weights, config, pruning, gates
        with torch.device("meta"):
            self.names = [name for name, _ in HybridLM(pruning.config(config)).named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        found = _CHANGED.fullmatch(name)
        if found is None:
            return value
        layer, branch, what = int(found[1]), found[2], found[3]
        if branch == "attention" and self.pruning.groups[layer] != Pruning.none(self.whole).groups[layer]:
            value = self._kept_heads(value, what, layer)
        if what == "out_proj.weight" and self.whole.kind_at(layer) == "hybrid" and self.pruning.kinds[layer] == branch:
            gate = self.gates[layer] if branch == "mamba" else 1 - self.gates[layer]
            value = (value * (2 * gate)[:, None]).to(value.dtype)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _kept_heads(self, value: Tensor, what: str, layer: int) -> Tensor:
        """The part of an attention's weight that belongs to the heads that stay."""
        D, queries = self.whole.head_dim, self.whole.queries_per_kv
        global_kv, windowed = self.whole.kv_heads_at(layer)
        K = global_kv + windowed
        kv = [*self.pruning.groups[layer], *range(global_kv, K)]
        q = [queries * head + i for head in kv for i in range(queries)]
        if what == "qkv_proj.weight":
            rows = [*q, *(queries * K + head for head in kv), *((queries + 1) * K + head for head in kv)]
            return value.unflatten(0, (-1, D))[rows].flatten(0, 1)
        if what == "out_proj.weight":
            return value.unflatten(1, (-1, D))[:, q].flatten(1)
        return value.unflatten(0, (-1, D))[q].flatten() if what == "norm" else value


def pruned_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    pruning: Pruning,
    gates: Tensor,
    kernels: Kernels | None = None,
    compute_dtype: torch.dtype | None = None,
) -> HybridLM:
    """The model that `pruning` leaves, in memory; what did not change is shared with `weights`."""
    with torch.device("meta"):
        model = HybridLM(pruning.config(config), kernels, compute_dtype=compute_dtype)
    model.load_state_dict(dict(PrunedWeights(weights, config, pruning, gates)), strict=True, assign=True)
    return model.eval()


# --- plans -----------------------------------------------------------------------------------------------------------


def make_plan(config: ModelConfig, gates: Tensor, hi: float, lo: float, tokens: int) -> dict[str, Any]:
    """What the gates let go of, to be read, edited and given to `export --prune`.

    A layer whose mean gate is above `hi` keeps only Mamba, below `lo` only attention. Its confidence is the share of
    its channels whose own mean is on the same side; that of a layer which keeps both, the share between the two.

    Args:
        gates: fp32 [layers, H], the mean by layer and channel. tokens: of the row whose cache is counted, bf16.
    """
    if not 0 <= lo < hi <= 1:
        raise UserError(f"--hi {hi} and --lo {lo}: a gate's mean is from 0 to 1, and hi must be above lo")
    layers = []
    nothing = Pruning.none(config)
    for layer in range(config.num_layers):
        mean = float(gates[layer].mean())
        sides: dict[LayerKind, Tensor] = {"mamba": gates[layer] > hi, "attention": gates[layer] < lo}
        sides["hybrid"] = ~(sides["mamba"] | sides["attention"])
        keep: LayerKind = config.kind_at(layer)
        if keep == "hybrid":
            keep = "mamba" if mean > hi else "attention" if mean < lo else "hybrid"
        pruning = nothing.replace(layer, keep)
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
    """Parameters, and bytes of one row's bf16 cache after `tokens` tokens, that `pruning` does without."""
    left = pruning.config(config)
    return {
        "parameters": config.parameter_count() - left.parameter_count(),
        "cache_bytes": cache_bytes(config, tokens) - cache_bytes(left, tokens),
    }


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the layers' memory for one row of `tokens` tokens in bf16."""
    cache = Cache(config, 1, torch.bfloat16, "meta")
    cache.reserve(tokens)
    return sum(map(_layer_bytes, cache.layers))


def _layer_bytes(layer: LayerCache) -> int:
    return sum(value.numel() * value.element_size() for value in vars(layer).values())


def read_plan(path: Path, config: ModelConfig) -> Pruning:
    """The pruning that a plan says; a layer that it does not name stays as it is.

    Only `layer`, `keep` and `global_groups` are read.

    Raises:
        UserError: it is no plan, names a layer or head that the model does not have, or would leave a layer nothing.
    """
    try:
        plan = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"no plan at {path}; make one with `fusiontree prune RUN --out {path}`") from None
    except ValueError as error:
        raise UserError(f"{path} is no pruning plan ({error}); make one with `fusiontree prune`") from None
    try:
        return planned(plan, config, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no pruning plan ({error!r}); make one with `fusiontree prune`") from None


def planned(plan: Mapping[str, Any], config: ModelConfig, path: object) -> Pruning:
    """The pruning of a plan as `make_plan` makes it; errors, which name `path`, as of `read_plan`."""
    entries = [(entry["layer"], entry.get("keep"), entry.get("global_groups")) for entry in plan["layers"]]
    if not entries:
        raise UserError(f"{path} names no layer; make a plan with `fusiontree prune`")
    pruning, seen = Pruning.none(config), set()
    for layer, keep, groups in entries:
        if type(layer) is not int or not 0 <= layer < config.num_layers:
            raise UserError(f"{path}: layer {layer!r} is unknown; the model's layers are 0 to {config.num_layers - 1}")
        if layer in seen:
            raise UserError(f"{path}: layer {layer} stands there twice; remove one")
        seen.add(layer)
        pruning = _planned(path, config, pruning, layer, keep, groups)
    return pruning


def _planned(path: object, config: ModelConfig, pruning: Pruning, layer: int, keep: Any, groups: Any) -> Pruning:
    if keep not in KINDS:
        raise UserError(
            f"{path}: layer {layer} keeps {keep!r}; it must keep a branch: mamba or attention, or both (hybrid)"
        )
    if config.kind_at(layer) not in ("hybrid", keep):
        raise UserError(f"{path}: layer {layer} has {config.kind_at(layer)} only; it cannot keep {keep}")
    global_kv, windowed = config.kv_heads_at(layer)
    if keep == "mamba" or groups is None:
        return pruning.replace(layer, keep)
    if (
        not isinstance(groups, list)
        or groups != [g for g in range(global_kv) if g in groups]
        or not all(type(g) is int for g in groups)
    ):
        raise UserError(f"{path}: layer {layer}: global_groups is {groups}; it must be some of 0 to {global_kv - 1}")
    if not groups and not windowed:
        raise UserError(f"{path}: layer {layer}: global_groups is empty, and the layer has no other head")
    return pruning.replace(layer, keep, tuple(groups))


# --- by held-out loss ------------------------------------------------------------------------------------------------


def branch_candidates(config: ModelConfig) -> dict[str, Pruning]:
    """Every single branch that can go, by a name to show, and what is left."""
    nothing = Pruning.none(config)
    hybrids = [layer for layer in range(config.num_layers) if config.kind_at(layer) == "hybrid"]
    keeps: dict[str, LayerKind] = {"attention": "mamba", "mamba": "attention"}
    return {f"{gone} of layer {i}": nothing.replace(i, keep) for i in hybrids for gone, keep in keeps.items()}


def head_candidates(config: ModelConfig) -> dict[str, Pruning]:
    """Every single global key-value head that can go with its queries, by a name to show, and what is left."""
    nothing, found = Pruning.none(config), {}
    for layer, groups in enumerate(nothing.groups):
        for gone in groups if len(groups) + config.kv_heads_at(layer)[1] > 1 else ():
            rest = tuple(group for group in groups if group != gone)
            found[f"global head group {gone} of layer {layer}"] = nothing.replace(layer, groups=rest)
    return found


def least_loss(
    candidates: Mapping[str, Pruning], count: int, config: ModelConfig, loss: Callable[[str, Pruning], float]
) -> tuple[Pruning, dict[str, float]]:
    """The `count` candidates that cost the least loss, each measured alone, together; and every one's loss.

    Raises:
        UserError: fewer than `count` can go, or `count` is below 1.
    """
    if not 1 <= count <= len(candidates):
        raise UserError(f"asked to prune {count}; this model has {len(candidates)} that can go, each alone")
    measured = {name: loss(name, pruning) for name, pruning in candidates.items()}
    together, taken = Pruning.none(config), 0
    for name in sorted(measured, key=measured.__getitem__):
        joined = _joined(together, candidates[name], config)
        if joined is not None and taken < count:
            together, taken = joined, taken + 1
    if taken < count:
        raise UserError(f"asked to prune {count}; {taken} can go together if every layer is to keep something")
    return together, dict(sorted(measured.items(), key=lambda item: item[1]))


def _joined(one: Pruning, other: Pruning, config: ModelConfig) -> Pruning | None:
    """What both prunings leave together; None where that would leave a layer nothing."""
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
