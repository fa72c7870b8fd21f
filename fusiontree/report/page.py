"""HTML page of a report. Text and tables are rendered here; ``page.js`` draws the charts from embedded data."""

import datetime
import html
import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import UserError
from fusiontree.files import write_atomic
from fusiontree.report.collect import NONE, collect


def write_report(runs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write a page on one run, or a comparison of several.

    Args:
        runs: folders of the runs.
        out: file to write; None: ``report.html`` in the run's folder, or ``compare.html`` in the first run's.

    Returns:
        Path of the page, labels of the runs, and bytes of the page.

    Raises:
        UserError: a folder is not a run's, or the folder of `out` does not exist.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice; give each run once")
    found = _labelled(runs, [collect(run) for run in runs])
    path = out or runs[0] / ("report.html" if len(runs) == 1 else "compare.html")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file")
    page = render(found).encode(errors="replace")  # half a surrogate pair, as in an undecodable path, is shown as "?"
    write_atomic(path, page)
    return {"report": str(path), "runs": [run["label"] for run in found], "page_bytes": len(page)}


def _labelled(runs: Sequence[Path], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each run's label on the page: its name, or its folder if two runs have the same name."""
    names = [run["name"] for run in found]
    return [
        run | {"label": run["name"] if names.count(run["name"]) == 1 else str(path)}
        for path, run in zip(runs, found, strict=True)
    ]


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's HTML for runs as returned by `collect`, each with its `label`."""
    title = " · ".join(run["label"] for run in runs)
    shown = [{key: value for key, value in run.items() if key not in ("config", "facts")} for run in runs]
    return string.Template(_asset("page.html")).substitute(
        title=html.escape(title),
        made=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        style=_asset("page.css"),
        script=_asset("page.js"),
        facts=_facts(runs),
        events=_events_table(runs),
        config=_config_tables(runs),
        # no string of a run can close the script element
        data=json.dumps(shown, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return (importlib.resources.files("fusiontree.report") / name).read_text(encoding="utf-8")


def _facts(runs: Sequence[Mapping[str, Any]]) -> str:
    """Render facts: as tiles for one run, as a table for several."""
    if len(runs) == 1:
        facts = ((html.escape(name), html.escape(text)) for name, text in runs[0]["facts"].items())
        return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{text}</dd></div>' for name, text in facts)}</dl>"
    rows = [[name, *(run["facts"][name] for run in runs)] for name in runs[0]["facts"]]
    return _table(["", *_heads(runs)], rows, "facts")


def _events_table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [run["label"], f"{event['step']:,}", event["kind"].replace("_", " "), event["message"], event["when"]]
        for run in runs
        for event in run["events"]
        if event["kind"] != "checkpoint"
    ]
    return _table(["run", "step", "kind", "message", "time"], rows, "events") if rows else "<p>No incidents.</p>"


def _config_tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Render the configuration: the differing values if there are several runs, then all values, folded."""
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    rows = {key: [run["config"].get(key, NONE) for run in runs] for key in keys}
    table = _table(["key", *_heads(runs)], [[key, *values] for key, values in rows.items()], "config")
    folded = f"<details><summary>All {len(keys)} values</summary>{table}</details>"
    if len(runs) == 1:
        return folded
    differing = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    same = "<p>The runs have the same configuration.</p>"
    return (_table(["key", *_heads(runs)], differing, "config differences") if differing else same) + folded


def _heads(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [run["label"] for run in runs]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Render a table whose first column has the row headers."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(text)}</td>" for text in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
