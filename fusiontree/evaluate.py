"""How good an exported model is on held-out shards."""

import math
from pathlib import Path
from typing import Any

import torch

from fusiontree.console import progress_bar
from fusiontree.data.format import Dataset
from fusiontree.data.sources import Sources
from fusiontree.data.stream import validation_batches
from fusiontree.errors import RunError, UserError
from fusiontree.generate import check_positions, load_export, read_facts
from fusiontree.model.documents import to_device

ROWS_PER_FORWARD = 4


def evaluate(
    folder: Path, tasks: list[str], data: Path, seq_len: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Run `tasks` on the model exported to `folder`.

    Args:
        tasks: of `TASKS`.
        data: a dataset folder; its validation split is read.
        seq_len: tokens per row; by default the length that the model was trained at, if the shards allow it.
        limit: rows at most.

    Raises:
        UserError: an unknown task, or shards made with another tokenizer.
        RunError: a row is damaged.
    """
    for name, value in (("--seq-len", seq_len), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    return {task: TASKS[task](folder, data, seq_len, limit) for task in tasks}


@torch.inference_mode()
def perplexity(folder: Path, data: Path, seq_len: int | None, limit: int | None) -> dict[str, float]:
    """Mean loss (nats per token) over the held-out tokens and its exponential; `chance_loss` is a uniform guess's."""
    model, _ = load_export(folder)
    facts, dataset = read_facts(folder), Dataset(data, "validation")
    dataset.manifest.require_tokenizer(facts["tokenizer_fingerprint"], folder)
    length = seq_len or facts["seq_len"]
    check_positions(model.config, length)
    device = model.embedding.weight.device
    loss, tokens = 0.0, 0
    with progress_bar() as bar:
        task = bar.add_task("perplexity", total=None, note="")
        for batch in validation_batches(Sources({"": dataset}), length, ROWS_PER_FORWARD, 0, 1, limit):
            if batch.damaged:
                raise RunError(f"{batch.damaged[0]}; restore the shard or build it again")
            ids, labels, documents = to_device(batch, device)
            loss += model(ids, documents, labels=labels).loss_sum.item()
            tokens += batch.real_tokens
            bar.update(task, advance=1, note=f"{loss / max(1, tokens):.4f} nats")
    if tokens == 0:
        raise UserError(f"{data} has no held-out token to predict; build it with a larger --holdout")
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "tokens": tokens,
        "seq_len": length,
        "chance_loss": math.log(model.config.vocab_size),
    }


TASKS = {"perplexity": perplexity}
