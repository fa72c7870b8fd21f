"""Data of a report, as plain values whose size does not grow with the length of the run."""

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from fusiontree.checkpoint import store
from fusiontree.errors import UserError, short_cause
from fusiontree.model.config import ModelConfig
from fusiontree.run import incidents
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, LAYERS_FILE, list_checkpoints, step_of
from fusiontree.run.jsonlines import read_json_lines
from fusiontree.run.records import read_metrics

NONE = "—"  # a missing value
MAX_POINTS = 1000  # per curve
MAX_COLUMNS = 160  # steps in a heat map
MAX_CHANNELS = 256  # per layer
MAX_EVENTS = 500  # per kind, the last ones
_LAYER_FIGURES = ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")


def collect(run: Path) -> dict[str, Any]:
    """Return the data of the page on the run in folder `run`, as JSON values; missing parts are empty.

    Raises:
        UserError: `run` is not a run's folder.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"no run at {run}; give a run's folder, e.g. runs/NAME")
    config = _read_config(run / CONFIG_FILE)
    lines = [line for line in read_metrics(run) if isinstance(line.get("step"), int)]
    layers = [line for line in read_json_lines(run / LAYERS_FILE) if isinstance(line.get("step"), int)]
    events = _events(run)
    return {
        "path": str(run),
        "name": str(config.get("name", run.name)),
        "batch_tokens": config.get("batch.tokens"),
        "facts": _facts(config, lines, events),
        "curves": {name: _curve(lines, name) for name in _curve_names(lines)},
        "buckets": _last_buckets(lines),
        "layers": _layer_maps(layers),
        "flop_share": layers[-1].get("flop_share", {}) if layers else {},
        "channels": _channels(run),
        "events": events,
        "config": {key: _text(value) for key, value in config.items()},
    }


def _read_config(path: Path) -> dict[str, Any]:
    """Return the run's configuration by dotted key, without validation: a report must open for any run."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({short_cause(error)}); restore it") from None
    return dict(_leaves(tree)) if isinstance(tree, dict) else {}


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# --- curves ----------------------------------------------------------------------------------------------------------


def _curve_names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, (int, float)))
    return [name for name in found if name not in ("step", "tokens")]


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[list[float | None]]:
    """Return steps and values; non-finite values become None."""
    points = [(line["step"], _finite(line[name])) for line in lines if name in line]
    return [list(column) for column in zip(*downsample(points, MAX_POINTS), strict=True)]


def downsample(points: Sequence[tuple[int, float | None]], limit: int) -> Sequence[tuple[int, float | None]]:
    """Return at most `limit` points in order, with the first, the last and every peak.

    Each segment keeps its minimum and its maximum, so no spike is lost. None counts as the minimum.
    """
    if len(points) <= limit:
        return points
    segments = (limit - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(segments):
        first, end = (round(k * len(inner) / segments) for k in (i, i + 1))
        values = [-math.inf if value is None else value for _, value in inner[first:end]]
        extremes = {first + values.index(value) for value in (min(values), max(values))}
        kept += [inner[index] for index in sorted(extremes)]
    return [*kept, points[-1]]


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _last_buckets(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last validation losses by document length and by position, with their buckets in order."""
    last: Mapping[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    found = {}
    for kind in ("length", "position"):
        prefix = f"val_loss_by_{kind}/"
        values = {k.removeprefix(prefix): _finite(v) for k, v in last.items() if k.startswith(prefix)}
        if values:
            found[kind] = {"step": last["step"], "names": list(values), "losses": list(values.values())}
    return found


# --- layers ----------------------------------------------------------------------------------------------------------


def _layer_maps(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each figure as a list over steps of lists over layers."""
    if not lines:
        return {}
    kept = [lines[index] for index in _spread(len(lines), MAX_COLUMNS)]
    maps = {name: [[_finite(v) for v in line.get(name, [])] for line in kept] for name in _LAYER_FIGURES}
    return {"steps": [line["step"] for line in kept], **maps}


def _spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced indices from 0 to count - 1, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _channels(run: Path) -> dict[str, Any]:
    """Return the gates by channel, sorted within each layer, of the newest checkpoint with a readable gates file."""
    for path in reversed(list_checkpoints(run / CHECKPOINTS)):
        try:
            gates = store.read_gates(path).sort(-1).values
        except (OSError, SafetensorError, KeyError):
            continue  # fall back to an older one; the page names the step
        kept = gates[:, _spread(gates.shape[1], MAX_CHANNELS)]
        values = [[round(value, 4) for value in layer] for layer in kept.tolist()]
        return {"step": step_of(path), "count": gates.shape[1], "values": values}
    return {}


# --- events and facts ------------------------------------------------------------------------------------------------


def _events(run: Path) -> list[dict[str, Any]]:
    """Return existing checkpoints and recorded incidents: kind, step, message, and time if known."""
    found: list[dict[str, Any]] = []
    for path in list_checkpoints(run / CHECKPOINTS):
        when = {"step": step_of(path), "time": path.stat().st_mtime}
        found.append({"kind": "checkpoint", "message": path.name, **when})
    for line in incidents.read(run):
        incident = {"kind": "incident", "step": 0, "message": "", "time": None} | line
        found.append({key: incident[key] for key in ("kind", "step", "message", "time")})
    counts: Counter[str] = Counter()
    kept = []
    for event in reversed(found):
        counts[event["kind"]] += 1
        if counts[event["kind"]] <= MAX_EVENTS:
            kept.append(event | {"when": _when(event["time"])})
    return kept[::-1]


def _when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _facts(
    config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the facts in the page's summary; missing ones are `NONE`."""
    steps, done = config.get("schedule.steps"), max((line["step"] for line in lines), default=0)
    validation = [(line["val_loss"], line["step"]) for line in lines if _finite(line.get("val_loss")) is not None]
    best = min(validation, default=None)
    kinds = Counter(event["kind"] for event in events)
    checkpoints = kinds.pop("checkpoint", 0)
    return {
        "updates": f"{done:,} of {steps:,}" if isinstance(steps, int) else f"{done:,}",
        "tokens": _number(max((line.get("tokens", 0) for line in lines), default=0)),
        "parameters": _number(_parameters(config)),
        "training loss": _last(lines, "loss"),
        "validation loss": _last(lines, "val_loss"),
        "best validation loss": NONE if best is None else f"{best[0]:.4f} at step {best[1]:,}",
        "validation perplexity": _last(lines, "val_perplexity", ",.2f"),
        "tokens/s (median)": _median(lines, "tokens_per_s", ",.0f"),
        "TFLOP/s a device (median)": _median(lines, "tflop_per_s", ",.4g"),
        "MFU (median)": _median(lines, "mfu", ".1%"),
        "peak memory": _last(lines, "memory_gib", ",.2f", " GiB"),
        "checkpoints kept": str(checkpoints),
        "incidents": ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items()) or "none",
    }


def _parameters(config: Mapping[str, Any]) -> int | None:
    shape = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    try:
        return ModelConfig(**shape).parameter_count()
    except (TypeError, ValueError):  # a hand-edited or damaged configuration
        return None


def _number(value: int | None) -> str:
    """Format a count, abbreviated from a million upwards."""
    if value is None:
        return NONE
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,}"


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for line in lines if (value := _finite(line.get(name))) is not None]


def _last(lines: Sequence[Mapping[str, Any]], name: str, form: str = ".4f", unit: str = "") -> str:
    values = _values(lines, name)
    return f"{values[-1]:{form}}{unit}" if values else NONE


def _median(lines: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    values = _values(lines, name)
    return f"{statistics.median(values):{form}}" if values else NONE
