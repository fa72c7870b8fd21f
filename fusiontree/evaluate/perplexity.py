"""The `perplexity` task: held-out loss in total, by position and by document."""

import math
from typing import Any

import numpy as np
import torch

from fusiontree.data.batch import IGNORE, Batch
from fusiontree.distributed.collectives import World
from fusiontree.evaluate.held_out import HeldOutLoss, held_out_batches
from fusiontree.evaluate.subject import Subject

_QUANTILES = {"a tenth below": 0.1, "half below": 0.5, "nine tenths below": 0.9}  # of the documents' mean losses
_HIGHEST = ("highest", "second", "third")  # documents listed by loss


def perplexity(subject: Subject) -> dict[str, Any]:
    """Return held-out loss (nats per token) and perplexity, with the losses of a uniform guess and of n-grams."""
    world = World(0, 1, subject.model.embedding.weight.device)
    model_loss, bigram_loss = HeldOutLoss(subject.held_out, world), HeldOutLoss(subject.held_out, world)
    unigram_sum, documents = 0.0, []
    for batch, losses in held_out_batches(
        subject.model, subject.held_out, subject.seq_len, subject.limit, "perplexity"
    ):
        real = batch.labels != IGNORE
        before, after = batch.input_ids[real], batch.labels[real]
        by_bigram = np.zeros(real.shape)
        by_bigram[real] = subject.bigram.losses(before, after)
        unigram_sum += float(subject.bigram.unigram_losses(after).sum())
        model_loss.add(batch, losses)
        bigram_loss.add(batch, torch.from_numpy(by_bigram))
        documents.append(_document_means(batch, losses.cpu().numpy(), by_bigram))
    means, bigram_means = model_loss.means(), bigram_loss.means()
    return {
        "loss": means.total.loss,
        "perplexity": math.exp(means.total.loss),
        "tokens": means.total.tokens,
        "documents": sum(counts.size for _, _, counts in documents),
        "seq_len": subject.seq_len,
        "chance_loss": subject.chance_loss,
        "unigram_loss": unigram_sum / means.total.tokens,
        "bigram_loss": bigram_means.total.loss,
        "by_position": {
            bucket: {
                "loss": mean.loss,
                "bigram_loss": bigram_means.by_position[bucket].loss,
                "chance_loss": subject.chance_loss,
                "tokens": mean.tokens,
            }
            for bucket, mean in means.by_position.items()
        },
        "by_document": _by_document(subject, *map(np.concatenate, zip(*documents, strict=True))),
    }


def _document_means(
    batch: Batch, losses: np.ndarray, by_bigram: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean loss, mean bigram loss and labels of each document that has labels, fp64 [documents]."""
    document = np.arange(len(batch.lengths)).repeat(batch.lengths)
    tokens = np.bincount(document, (batch.labels != IGNORE).flatten())
    found = tokens > 0  # not padding, nor documents of one token
    sums = (np.bincount(document, values.flatten())[found] for values in (losses, by_bigram))
    loss, bigram_loss = (total / tokens[found] for total in sums)
    return loss, bigram_loss, tokens[found]


def _by_document(
    subject: Subject, losses: np.ndarray, bigram_losses: np.ndarray, tokens: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return quantiles of the documents' mean losses, and the documents with the highest ones.

    The quantiles of model and bigram are taken separately: they may come from different documents.
    """
    rows = {}
    for name, share in _QUANTILES.items():
        loss, bigram_loss = (float(np.quantile(values, share)) for values in (losses, bigram_losses))
        rows[name] = {"loss": loss, "bigram_loss": bigram_loss, "chance_loss": subject.chance_loss}
    for name, i in zip(_HIGHEST, np.argsort(losses)[::-1], strict=False):
        means = {"loss": float(losses[i]), "bigram_loss": float(bigram_losses[i]), "chance_loss": subject.chance_loss}
        rows[name] = {**means, "tokens": int(tokens[i])}
    return rows
