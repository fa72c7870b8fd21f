"""Printing of a command's figures, as text or as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusiontree.cli.stdout import print_result, results

_MAX_SKIPPED = 10  # skipped inputs listed without --json
_UNITS = {"seconds": "s", "loss": "nats per token", "tokens_per_s": "tokens/s"}  # by the suffix of a figure's key
_UNLIMITED = 100_000  # columns of an output that is not a terminal: rich would wrap at 80


def show(figures: dict[str, Any], as_json: bool) -> int:
    """Print figures as JSON or as aligned lines, and return 0."""
    if as_json:
        print_result(json.dumps(figures, indent=2, default=str))
        return 0
    _print_lines(_lines(figures))
    return 0


def show_tables(figures: dict[str, dict[str, Any]], as_json: bool) -> int:
    """Print groups of figures like `show`, but each mapping or list of records as a table; return 0."""
    if as_json:
        return show(figures, as_json)
    for name, group in figures.items():
        tables = {key: rows for key, value in group.items() if (rows := _table_rows(value))}
        print_result(name)
        _print_lines(_lines({key: value for key, value in group.items() if key not in tables}, "  "))
        for key, rows in tables.items():
            print_result()
            _print_table(_label(key), rows)
        print_result()
    return 0


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in lines), default=0)
    for label, value in lines:
        print_result(f"{label:<{width}}  {value}".rstrip())


def _print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    table.add_column(title)
    for key in keys:
        table.add_column(_label(key) + " (s)" * key.endswith("_seconds"), justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_text(key, row.get(key), unit=False) for key in keys))
    width = None if results().isatty() else _UNLIMITED
    Console(file=results(), width=width, markup=False, emoji=False, highlight=False).print(Padding.indent(table, 2))


def _table_rows(value: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by name, from a mapping or list of mappings; nothing for any other value."""
    if isinstance(value, list):
        value = {str(number): row for number, row in enumerate(value, 1)}
    if not isinstance(value, dict) or not all(isinstance(row, dict) for row in value.values()):
        return {}
    return {name: dict(_cells(row)) for name, row in value.items()}


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (column, value) of a row; a nested mapping's columns are named by both keys."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}_{inner}", cell) for inner, cell in _cells(value))
        else:
            yield key, value


def _skipped(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the number of skipped inputs and the first of them with reasons; empty files come last."""
    if not entries:
        return ["none"]
    names = [_skipped_entry(entry) for entry in sorted(entries, key=lambda e: e["reason"] == "empty")]
    more = [f"and {len(names) - _MAX_SKIPPED} more; --json lists all"] if len(names) > _MAX_SKIPPED else []
    files = sum("places" not in entry for entry in entries)
    documents = sum(entry.get("count", 0) for entry in entries)
    counts = [f"{files:,} files"] * bool(files) + [f"{documents:,} documents"] * bool(documents)
    return [" and ".join(counts), *names[:_MAX_SKIPPED], *more]


def _skipped_entry(entry: Mapping[str, Any]) -> str:
    """Format a skipped file, or skipped documents of a file, with the reason."""
    places = entry.get("places", [])
    more = f" and {entry['count'] - len(places)} more" if places and entry["count"] > len(places) else ""
    where = f" ({', '.join(places)}{more})" if places else ""
    return f"{entry['path']}{where}: {entry['reason']}"


def _lines(figures: dict[str, Any], indent: str = "") -> list[tuple[str, str]]:
    """Return (label, text) of each figure; nested figures are indented below their group's label."""
    lines: list[tuple[str, str]] = []
    for key, value in figures.items():
        label = indent + _label(str(key))
        if isinstance(value, dict):
            unit = next((unit for unit in ("_bytes", "_seconds") if str(key).endswith(unit)), "")
            inner = {f"{name}{unit}": figure for name, figure in value.items()}
            lines += [(label, "" if value else "none"), *_lines(inner, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            texts = _skipped(value) if key == "skipped" else [_text(str(key), item) for item in value] or ["none"]
            lines += [(label if i == 0 else "", text) for i, text in enumerate(texts)]
        else:
            lines.append((label, _text(str(key), value)))
    return lines


def _label(key: str) -> str:
    """Return a figure's name without its unit, which is printed after the number."""
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _text(key: str, value: Any, unit: bool = True) -> str:
    """Format a figure with the unit of its key's suffix; without `unit`, only byte counts get one."""
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
