"""Held-out loss: the mean, by position in the document, and by document."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusiontree.console import progress_bar
from fusiontree.data.batch import Batch
from fusiontree.data.sources import Sources
from fusiontree.data.stream import validation_batches
from fusiontree.errors import RunError, UserError
from fusiontree.evaluate.subject import Subject
from fusiontree.model.documents import Documents, to_device
from fusiontree.model.lm import HybridLM
from fusiontree.model.loss import IGNORE, token_losses

ROWS_PER_FORWARD = 4
_FIRST_BUCKET = 64  # tokens; each later one ends at four times the position
_QUANTILES = {"a tenth below": 0.1, "half below": 0.5, "nine tenths below": 0.9}  # of the documents
_HIGHEST = ("highest", "second", "third")  # documents that are shown


class Losses(NamedTuple):
    """Of the labelled tokens of a batch, in order; int64 but for the losses."""

    loss: np.ndarray  # fp32, nats
    before: np.ndarray  # the token that predicts
    after: np.ndarray  # the token predicted
    position: np.ndarray  # of the token that predicts, in its document
    document: np.ndarray  # numbered over all batches


@torch.inference_mode()
def held_out_loss(model: HybridLM, held_out: Sources, seq_len: int, limit: int | None, note: str) -> float:
    """Mean loss over the held-out tokens, nats per token; arguments as of `_batches`."""
    loss, tokens = 0.0, 0
    for batch, (ids, labels, documents) in _batches(model, held_out, seq_len, limit, note):
        loss += float(_token_losses(model, ids, labels, documents).sum())
        tokens += batch.real_tokens
    return loss / tokens


@torch.inference_mode()
def perplexity(subject: Subject) -> dict[str, Any]:
    """Loss (nats per token) of the held-out tokens and its exponential, beside a uniform guess and n-grams."""
    found = [
        _losses(subject.model, inputs, number)
        for number, (_, inputs) in enumerate(
            _batches(subject.model, subject.held_out, subject.seq_len, subject.limit, "perplexity")
        )
    ]
    losses = Losses(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    bigram = subject.bigram.losses(losses.before, losses.after)
    mean = float(losses.loss.mean(dtype=np.float64))
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "tokens": len(losses.loss),
        "documents": len(np.unique(losses.document)),
        "seq_len": subject.seq_len,
        "chance_loss": subject.chance_loss,
        "unigram_loss": float(subject.bigram.unigram_losses(losses.after).mean()),
        "bigram_loss": float(bigram.mean()),
        "by_position": _by_position(subject, losses, bigram),
        "by_document": _by_document(subject, losses, bigram),
    }


def _by_position(subject: Subject, losses: Losses, bigram: np.ndarray) -> dict[str, dict[str, float]]:
    buckets, first, end = {}, 0, _FIRST_BUCKET
    while first < subject.seq_len:
        inside = (losses.position >= first) & (losses.position < end)
        if inside.any():
            buckets[f"{first} to {min(end, subject.seq_len) - 1}"] = {
                "loss": float(losses.loss[inside].mean(dtype=np.float64)),
                "bigram_loss": float(bigram[inside].mean()),
                "chance_loss": subject.chance_loss,
                "tokens": int(inside.sum()),
            }
        first, end = end, 4 * end
    return buckets


def _by_document(subject: Subject, losses: Losses, bigram: np.ndarray) -> dict[str, dict[str, float]]:
    """Quantiles of the documents' means, the bigram's of its own means, and the documents of the highest."""
    _, place, count = np.unique(losses.document, return_inverse=True, return_counts=True)
    means, by_bigram = (np.bincount(place, values) / count for values in (losses.loss, bigram))
    rows = {}
    for name, share in _QUANTILES.items():
        loss, bigram_loss = (float(np.quantile(values, share)) for values in (means, by_bigram))
        rows[name] = {"loss": loss, "bigram_loss": bigram_loss, "chance_loss": subject.chance_loss}
    for name, i in zip(_HIGHEST, np.argsort(means)[::-1], strict=False):
        found = {"loss": float(means[i]), "bigram_loss": float(by_bigram[i]), "chance_loss": subject.chance_loss}
        rows[name] = {**found, "tokens": int(count[i])}
    return rows


def _losses(model: HybridLM, inputs: tuple[Tensor, Tensor, Documents], number: int) -> Losses:
    ids, labels, documents = inputs
    real = (labels != IGNORE).cpu()
    rows = torch.arange(number * len(ids), (number + 1) * len(ids))[:, None] * ids.shape[1]
    values = (ids, labels, documents.position_ids, documents.seq_idx.cpu() + rows)
    loss = _token_losses(model, ids, labels, documents).cpu()[real].numpy()
    return Losses(loss, *(value.cpu()[real].numpy().astype(np.int64) for value in values))


def _token_losses(model: HybridLM, ids: Tensor, labels: Tensor, documents: Documents) -> Tensor:
    """Nats of each token, fp32 [B, L], 0 where there is no label."""
    hidden, _ = model.hidden(ids, documents)
    return token_losses(hidden.flatten(0, 1), model.head_weight, labels.flatten()).view_as(labels)


def _batches(
    model: HybridLM, held_out: Sources, seq_len: int, limit: int | None, note: str
) -> Iterator[tuple[Batch, tuple[Tensor, Tensor, Documents]]]:
    """Held-out batches with their tensors on the model's device.

    Args:
        seq_len: tokens per row. limit: rows at most. note: the progress bar's name.

    Raises:
        UserError: there is no held-out token. RunError: a row is damaged.
    """
    tokens = 0
    with progress_bar() as bar:
        task = bar.add_task(note, total=None, note="")
        for batch in validation_batches(held_out, seq_len, ROWS_PER_FORWARD, 0, 1, limit):
            if batch.damaged:
                raise RunError(f"{batch.damaged[0]}; restore the shard or build it again")
            yield batch, to_device(batch, model.embedding.weight.device)
            tokens += batch.real_tokens
            bar.update(task, advance=1, note=f"{tokens:,} tokens")
    if tokens == 0:
        where = ", ".join(str(dataset.location) for dataset in held_out.datasets)
        raise UserError(f"{where} has no held-out token to predict; build it with a larger --holdout")
