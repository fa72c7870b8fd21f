"""A command's figures, for a person or as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAMED = 10  # inputs left out that are named, unless --json is given
_UNITS = {"seconds": "s", "loss": "nats per token", "tokens_per_s": "tokens/s"}  # by the end of a figure's key


def show(figures: dict[str, Any], as_json: bool) -> int:
    """Print a command's figures, as JSON or as aligned lines; returns 0."""
    if as_json:
        print(json.dumps(figures, indent=2, default=str))
        return 0
    _show_lines(_lines(figures))
    return 0


def _show_lines(lines: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in lines), default=0)
    for label, value in lines:
        print(f"{label:<{width}}  {value}".rstrip())


def show_tables(figures: dict[str, dict[str, Any]], as_json: bool) -> int:
    """Like `show`, but what a group of `figures` has of several things stands as a table, a line of each."""
    if as_json:
        return show(figures, as_json)
    for name, group in figures.items():
        tables = {key: rows for key, value in group.items() if (rows := _rows(value))}
        print(name)
        _show_lines(_lines({key: value for key, value in group.items() if key not in tables}, "  "))
        for key, rows in tables.items():
            print()
            _show_table(_label(key), rows)
        print()
    return 0


def _rows(value: Any) -> dict[str, dict[str, Any]]:
    """The lines of a table by name, where `value` is one: mappings, by name or in a list; no line elsewhere."""
    if isinstance(value, list):
        value = {str(number): row for number, row in enumerate(value, 1)}
    if not isinstance(value, dict) or not all(isinstance(row, dict) for row in value.values()):
        return {}
    return {name: dict(_columns(row)) for name, row in value.items()}


def _columns(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The cells of a line; those of a mapping inside it are named by both keys."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}_{inner}", cell) for inner, cell in _columns(value))
        else:
            yield key, value


def _show_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [[title, *(_label(key) + " (s)" * key.endswith("_seconds") for key in keys)]]
    lines += [[name, *(_text(key, row.get(key), unit=False) for key in keys)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join(["  " + name.ljust(widths[0]), *numbers]))


def _skipped(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many inputs were left out and the names of some, with the reason: empty files, which are common, last."""
    if not entries:
        return ["none"]
    names = [_skipped_entry(entry) for entry in sorted(entries, key=lambda e: e["reason"] == "empty")]
    rest = [f"and {len(names) - _NAMED} more; --json names all"] if len(names) > _NAMED else []
    files = sum("places" not in entry for entry in entries)
    documents = sum(entry.get("count", 0) for entry in entries)
    counts = [f"{files:,} files"] * bool(files) + [f"{documents:,} documents"] * bool(documents)
    return [" and ".join(counts), *names[:_NAMED], *rest]


def _skipped_entry(entry: Mapping[str, Any]) -> str:
    """A file, or some of the documents in it, and why it was left out."""
    places = entry.get("places", [])
    more = f" and {entry['count'] - len(places)} more" if places and entry["count"] > len(places) else ""
    where = f" ({', '.join(places)}{more})" if places else ""
    return f"{entry['path']}{where}: {entry['reason']}"


def _lines(figures: dict[str, Any], indent: str = "") -> list[tuple[str, str]]:
    """Label and text of each figure; what is nested stands indented below its name."""
    lines: list[tuple[str, str]] = []
    for key, value in figures.items():
        label = indent + _label(str(key))
        if isinstance(value, dict):
            lines += [(label, "" if value else "none"), *_lines(value, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            texts = _skipped(value) if key == "skipped" else [_text(str(key), item) for item in value] or ["none"]
            lines += [(label if i == 0 else "", text) for i, text in enumerate(texts)]
        else:
            lines.append((label, _text(str(key), value)))
    return lines


def _label(key: str) -> str:
    """A figure's name without its unit, which stands beside the number."""
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _text(key: str, value: Any, unit: bool = True) -> str:
    """A figure with its unit, which the end of its key names; of bytes always, of others where `unit`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v!r}" if isinstance(v, str) else f"{k} {_text(k, v)}" for k, v in value.items())
    if not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.2f} MiB"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    name = next((name for ending, name in _UNITS.items() if key.endswith(ending)), "")
    return f"{number} {name}".rstrip() if unit else number
