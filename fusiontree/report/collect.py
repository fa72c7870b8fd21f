"""What a report shows of a run, as plain values that fit into a page however long the run was."""

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
from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig
from fusiontree.run import incidents
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, LAYERS_FILE, list_checkpoints, step_of
from fusiontree.run.jsonlines import read_json_lines
from fusiontree.run.records import read_metrics

CURVE = 1000  # points of a curve at most: of longer ones, the least and the greatest of each stretch
NONE = "—"
COLUMNS = 160  # steps of a heat map at most
CHANNELS = 256  # channels of a layer at most
EVENTS = 500  # of each kind at most, the last
_MAPS = ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")


def collect(run: Path) -> dict[str, Any]:
    """All that a page shows of the run in folder `run`, as JSON; what the run does not have is empty.

    Raises:
        UserError: it is not a run's folder.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run's folder: it has no {CONFIG_FILE}; give one such as runs/NAME")
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
        "layers": _maps(layers),
        "flop_share": layers[-1].get("flop_share", {}) if layers else {},
        "channels": _channels(run),
        "events": events,
        "config": {key: _text(value) for key, value in config.items()},
    }


def _read_config(path: Path) -> dict[str, Any]:
    """The run's configuration by dotted key; read as it stands, for another version may know other keys."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); restore it") from None
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
    """Steps and values; a value that is not finite is None."""
    points = [(line["step"], _finite(line[name])) for line in lines if name in line]
    return [list(column) for column in zip(*thin(points, CURVE), strict=True)]


def thin(points: Sequence[tuple[int, float | None]], most: int) -> Sequence[tuple[int, float | None]]:
    """At most `most` of the points in their order, the first, the last and every peak among them.

    Of each stretch the least and the greatest stay, so that no spike is lost; one that is None stays as the least.
    """
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(stretches):
        first, end = (round(k * len(inner) / stretches) for k in (i, i + 1))
        heights = [-math.inf if value is None else value for _, value in inner[first:end]]
        ends = {first + heights.index(height) for height in (min(heights), max(heights))}
        kept += [inner[place] for place in sorted(ends)]
    return [*kept, points[-1]]


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _last_buckets(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last validation loss by document length and by position: buckets in order, and their losses."""
    last: Mapping[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    found = {}
    for kind in ("length", "position"):
        prefix = f"val_loss_by_{kind}/"
        values = {k.removeprefix(prefix): _finite(v) for k, v in last.items() if k.startswith(prefix)}
        if values:
            found[kind] = {"step": last["step"], "names": list(values), "losses": list(values.values())}
    return found


# --- layers ----------------------------------------------------------------------------------------------------------


def _maps(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures by layer over the steps: each a list of steps of a list of layers."""
    if not lines:
        return {}
    kept = [lines[place] for place in _evenly(len(lines), COLUMNS)]
    maps = {name: [[_finite(v) for v in line.get(name, [])] for line in kept] for name in _MAPS}
    return {"steps": [line["step"] for line in kept], **maps}


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to count - 1 at even distances, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _channels(run: Path) -> dict[str, Any]:
    """The gates by channel, sorted within each layer, of the newest checkpoint whose file of gates can be read."""
    for path in reversed(list_checkpoints(run / CHECKPOINTS)):
        try:
            gates = store.read_gates(path).sort(-1).values
        except (OSError, SafetensorError, KeyError):
            continue  # an older one serves as well: the page says which step it shows
        kept = gates[:, _evenly(gates.shape[1], CHANNELS)]
        values = [[round(value, 4) for value in layer] for layer in kept.tolist()]
        return {"step": step_of(path), "count": gates.shape[1], "values": values}
    return {}


# --- events and facts ------------------------------------------------------------------------------------------------


def _events(run: Path) -> list[dict[str, Any]]:
    """Checkpoints that are there, and incidents: kind, step, what a person should read, and when, if that is known."""
    found: list[dict[str, Any]] = []
    for path in list_checkpoints(run / CHECKPOINTS):
        place = {"step": step_of(path), "time": path.stat().st_mtime}
        found.append({"kind": "checkpoint", "message": path.name, **place})
    for line in incidents.read(run):
        known = {"kind": "incident", "step": 0, "message": "", "time": None} | line
        found.append({key: known[key] for key in ("kind", "step", "message", "time")})
    counts: Counter[str] = Counter()
    kept = []
    for event in reversed(found):
        counts[event["kind"]] += 1
        if counts[event["kind"]] <= EVENTS:
            kept.append(event | {"when": _when(event["time"])})
    return kept[::-1]


def _when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _facts(
    config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What stands at the head of the page; a dash where the run has none."""
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
    except (TypeError, ValueError):  # of another version
        return None


def _number(value: int | None) -> str:
    """A count, shortened from a million on."""
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
