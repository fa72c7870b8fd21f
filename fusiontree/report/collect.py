"""Data of a report, as plain values whose size does not grow with the length of the run."""

import contextlib
import datetime
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusiontree.checkpoint import store
from fusiontree.errors import RunError, UserError, short_cause
from fusiontree.model.config import ModelConfig
from fusiontree.run import incidents
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, list_checkpoints, step_of
from fusiontree.run.records import iter_metrics, read_layers
from fusiontree.run.state_files import DamagedError, read_bytes

NONE = "—"  # a missing value
MAX_POINTS = 1000  # per curve
MAX_COLUMNS = 160  # steps in a heat map
MAX_CHANNELS = 256  # per layer
MAX_EVENTS = 500  # per kind, the last ones
MAX_TEXT = 2000  # characters of a message
_LAYER_FIGURES = ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")


def collect(run: Path) -> dict[str, Any]:
    """Return the data of the page on the run in folder `run`, as JSON values; missing parts are empty.

    Raises:
        UserError: `run` is not a run's folder.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"no run at {run}; give a run's folder, e.g. runs/NAME")
    config = _read_config(run / CONFIG_FILE)
    figures, layers, events = Figures(iter_metrics(run)), read_layers(run), _events(run)
    batch, shares = config.get("batch.tokens"), layers[-1]["flop_share"] if layers else {}
    return {
        "path": str(run),
        "name": str(config.get("name", run.name)),
        "batch_tokens": batch if type(batch) is int and 0 < batch < 2**53 else None,
        "facts": _facts(config, figures, events),
        "curves": {name: _curve(figures, name) for name in figures.names if name not in ("step", "tokens")},
        "buckets": _last_buckets(figures.last_validation),
        "layers": _layer_maps(layers),
        "flop_share": {part: share for part, share in shares.items() if math.isfinite(share)},
        "channels": _channels(run),
        "events": events,
        "config": {key: _text(value) for key, value in config.items()},
    }


def _read_config(path: Path) -> dict[str, Any]:
    """Return the run's configuration by dotted key, without validation: a report must open for any run.

    Raises:
        UserError: it is not YAML, or has aliases, a few of which can stand for gigabytes.
    """
    try:
        text = read_bytes(path).decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise DamagedError("it has aliases")
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
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


class Figures:
    """The figures of a run's metrics as columns: 8 bytes a number, however many lines there are."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]):
        """Read `lines`, in their order."""
        self.names: dict[str, None] = {}
        self.last: Mapping[str, Any] = {}
        self.last_validation: Mapping[str, Any] = {}
        # lines with the same names are the rows of one table: their numbers, and all their values
        tables: defaultdict[tuple[str, ...], tuple[array[int], array[float]]]
        tables = defaultdict(lambda: (array("q"), array("d")))
        for number, line in enumerate(lines):
            numbers, values = tables[tuple(line)]
            numbers.append(number)
            values.extend(line.values())
            self.last = line
            if "val_loss" in line:
                self.last_validation = line
        self._tables = []
        for names, (numbers, values) in tables.items():
            self._tables.append((names, np.array(numbers), np.array(values).reshape(len(numbers), len(names))))
            self.names |= dict.fromkeys(names)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps of the lines that have a figure, int64 [n], and its values, fp64 [n]."""
        found = [table for table in self._tables if name in table[0]]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0)
        order = np.argsort(np.concatenate([numbers for _, numbers, _ in found]))
        steps, values = (
            np.concatenate([table[:, names.index(key)] for names, _, table in found])[order] for key in ("step", name)
        )
        return steps.astype(np.int64), values

    def finite(self, name: str) -> np.ndarray:
        """Return the finite values of a figure, fp64 [n]."""
        values = self.column(name)[1]
        return values[np.isfinite(values)]


def _curve(figures: Figures, name: str) -> list[list[float | None]]:
    """Return steps and values; non-finite values become None."""
    steps, values = figures.column(name)
    kept = downsample(values, MAX_POINTS)
    return [steps[kept].tolist(), [_finite(value) for value in values[kept].tolist()]]


def downsample(values: np.ndarray, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` values in order, with the first, the last and every peak.

    Each segment keeps its minimum and its maximum, so no spike is lost. Non-finite values count as the minimum.

    Args:
        values: fp64 [n].
        limit: at least 4.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    segments = (limit - 2) // 2
    heights = np.where(np.isfinite(values), values, -np.inf)
    bounds = [1 + round(k * (count - 2) / segments) for k in range(segments + 1)]
    kept = {0, count - 1}
    for first, end in pairwise(bounds):
        kept |= {first + int(heights[first:end].argmin()), first + int(heights[first:end].argmax())}
    return np.array(sorted(kept))


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _last_buckets(last: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses of the last validation by document length and by position, with their buckets in order."""
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
    maps = {name: [[_finite(v) for v in line[name]] for line in kept] for name in _LAYER_FIGURES}
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
        except RunError:
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
        with contextlib.suppress(FileNotFoundError):  # a run that trains removes old checkpoints
            when = {"step": step_of(path), "time": path.stat().st_mtime}
            found.append({"kind": "checkpoint", "message": path.name, **when})
    for incident in incidents.read(run):
        kind, message = (incident[key][:MAX_TEXT] for key in ("kind", "message"))
        found.append({"kind": kind, "message": message, "step": incident["step"], "time": incident["time"]})
    counts: Counter[str] = Counter()
    kept = []
    for event in reversed(found):
        counts[event["kind"]] += 1
        if counts[event["kind"]] <= MAX_EVENTS:
            kept.append(event | {"when": _when(event["time"])})
    return kept[::-1]


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _facts(config: Mapping[str, Any], figures: Figures, events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the facts in the page's summary; missing ones are `NONE`."""
    steps, done = config.get("schedule.steps"), figures.last.get("step", 0)
    kinds = Counter(event["kind"] for event in events)
    checkpoints = kinds.pop("checkpoint", 0)
    return {
        "updates": f"{done:,} of {steps:,}" if isinstance(steps, int) else f"{done:,}",
        "tokens": _number(_finite(figures.last.get("tokens", 0))),
        "parameters": _number(_parameters(config)),
        "training loss": _last(figures, "loss"),
        "validation loss": _last(figures, "val_loss"),
        "best validation loss": _best(figures, "val_loss"),
        "validation perplexity": _last(figures, "val_perplexity", ",.2f"),
        "tokens/s (median)": _median(figures, "tokens_per_s", ",.0f"),
        "TFLOP/s a device (median)": _median(figures, "tflop_per_s", ",.4g"),
        "MFU (median)": _median(figures, "mfu", ".1%"),
        "peak memory": _last(figures, "memory_gib", ",.2f", " GiB"),
        "checkpoints kept": str(checkpoints),
        "incidents": ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items()) or "none",
    }


def _parameters(config: Mapping[str, Any]) -> int | None:
    shape = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    try:
        return ModelConfig(**shape).parameter_count()
    except (TypeError, ValueError, ArithmeticError):  # a hand-edited or damaged configuration
        return None


def _number(value: float | None) -> str:
    """Format a count, abbreviated from a million upwards."""
    if value is None:
        return NONE
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,}"


def _last(figures: Figures, name: str, form: str = ".4f", unit: str = "") -> str:
    values = figures.finite(name)
    return f"{values[-1]:{form}}{unit}" if len(values) else NONE


def _median(figures: Figures, name: str, form: str) -> str:
    values = figures.finite(name)
    return f"{np.median(values):{form}}" if len(values) else NONE


def _best(figures: Figures, name: str) -> str:
    steps, values = figures.column(name)
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return NONE
    best = finite[values[finite].argmin()]
    return f"{values[best]:.4f} at step {steps[best]:,}"
