"""How good an exported model is, and how fast: each figure beside what chance or counting words would give."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import UserError
from fusiontree.evaluate.perplexity import perplexity
from fusiontree.evaluate.retrieval import needle, passkey, recall
from fusiontree.evaluate.subject import Subject
from fusiontree.evaluate.throughput import TOTAL_NEW_TOKENS, throughput
from fusiontree.files import refuse_existing, staged_folder

TASKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "perplexity": perplexity,
    "passkey": passkey,
    "needle": needle,
    "recall": recall,
    "throughput": throughput,
}
RESULTS = "results.json"
LONGEST = 2**24  # tokens of a prompt, more than any model here was trained at


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    data: Path,
    lengths: Sequence[int] = (),
    seq_len: int | None = None,
    limit: int | None = None,
    samples: int = 5,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run `tasks` on the model exported to `folder`.

    Args:
        tasks: of `TASKS`.
        data: a dataset folder: perplexity and the haystacks are its held-out rows, the n-gram baseline counts its
            training rows.
        lengths: tokens of the prompts; by default the length that the model was trained at.
        seq_len: tokens per row of the perplexity; by default likewise, if the shards allow it.
        limit: held-out rows at most.
        samples: prompts of each kind.
        output: folder to make: the results as JSON, and a heat map (PNG) of each task that has one.

    Raises:
        UserError: an unknown task, an option out of range, shards made with another tokenizer, or no matplotlib for the
            heat maps.
        RunError: a row is damaged.
    """
    numbers = [("--seq-len", seq_len), ("--limit", limit), ("--samples", samples), *(("--lengths", n) for n in lengths)]
    for name, value in numbers:
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if lengths and max(lengths) > LONGEST:
        raise UserError(f"--lengths is {max(lengths)}; it must be at most {LONGEST:,}")
    if not tasks:
        raise UserError(f"--tasks names none; choose from {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if output is not None:
        refuse_existing(output, overwrite, RESULTS)
        _require_matplotlib()
    behind = TOTAL_NEW_TOKENS if "throughput" in tasks else 0
    subject = Subject.load(folder, data, tuple(lengths), behind, seq_len, limit, samples)
    results = {task: TASKS[task](subject) for task in tasks}
    if output is not None:
        _write(output, overwrite, results)
    return results


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--output needs matplotlib; pip install 'fusiontree[eval]', or leave it out") from None


def _write(output: Path, overwrite: bool, results: dict[str, Any]) -> None:
    from fusiontree.evaluate.heatmap import draw

    with staged_folder(output, overwrite, RESULTS) as partial:
        (partial / RESULTS).write_text(json.dumps(results, indent=1))
        for task, figures in results.items():
            if "cells" in figures:
                draw(partial / f"{task}.png", task, figures["cells"], figures["chance"])
