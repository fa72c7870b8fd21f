"""Evaluation of an exported model by task. Quality figures come with those of chance and of n-grams."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import UserError
from fusiontree.evaluate.options import EvalOptions
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
# the properties of a `Subject` that each task reads; they are read before the first task, so that no figures are lost
_READS = {
    "perplexity": ("held_out", "bigram"),
    "passkey": ("bigram",),
    "needle": ("text", "bigram"),
    "recall": ("bigram",),
    "throughput": ("text",),
}


def evaluate(folder: Path, tasks: Sequence[str], options: EvalOptions) -> dict[str, Any]:
    """Run `tasks`, names in `TASKS`, on the model exported to `folder`, and return their figures by task.

    Raises:
        UserError: no task or an unknown one, data built with another tokenizer, or heat maps without matplotlib.
        RunError: a row is damaged.
    """
    if not tasks:
        raise UserError(f"--tasks is empty; choose from {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task!r} is unknown; choose from {', '.join(TASKS)}")
    output, overwrite = options.output, options.overwrite
    if output is not None:
        refuse_existing(output, overwrite, RESULTS)
        _require_matplotlib()
    subject = Subject.load(folder, options, new_tokens=TOTAL_NEW_TOKENS if "throughput" in tasks else 0)
    for name in dict.fromkeys(name for task in tasks for name in _READS[task]):
        getattr(subject, name)
    results = {task: TASKS[task](subject) for task in tasks}
    if output is not None:
        _write(output, overwrite, results)
    return results


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--output needs matplotlib; install it: pip install 'fusiontree[eval]', or omit --output"
        ) from None


def _write(output: Path, overwrite: bool, results: dict[str, Any]) -> None:
    from fusiontree.evaluate.heatmap import draw

    with staged_folder(output, overwrite, RESULTS) as partial:
        (partial / RESULTS).write_text(json.dumps(results, indent=1))
        for task, figures in results.items():
            if "cells" in figures:
                draw(partial / f"{task}.png", task, figures["cells"], figures["chance"])
