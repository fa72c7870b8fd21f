"""Held-out loss: the mean over all tokens, and by source, document length and position in the document."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusiontree.console import progress_bar
from fusiontree.data.batch import IGNORE, Batch
from fusiontree.data.sources import Sources
from fusiontree.data.stream import validation_batches
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError
from fusiontree.model.documents import to_device
from fusiontree.model.lm import HybridLM
from fusiontree.model.loss import token_losses

BOUNDS = (256, 1024, 4096, 16_384, 65_536)  # tokens; a bucket ends with its bound, the last has none
BUCKETS = ("0-256", "256-1K", "1K-4K", "4K-16K", "16K-64K", "64K+")
ROWS_PER_FORWARD = 4


class Mean(NamedTuple):
    """Mean loss of some tokens, in nats per token."""

    loss: float
    tokens: int


class Means(NamedTuple):
    """Mean losses of all tokens and of each part that has tokens, by source label or bucket."""

    total: Mean
    by_source: dict[str, Mean]
    by_length: dict[str, Mean]
    by_position: dict[str, Mean]


class HeldOutLoss:
    """Accumulator of token losses by source, document length and position in the document.

    A document that was cut to fit a row counts with the length of its piece, which is all that the model sees. Sums are
    fp64 and cover the same tokens for any number of ranks.
    """

    def __init__(self, sources: Sources, world: World):
        self.sources, self.labels, self.world = sources, sources.labels, world
        self.shape = (len(self.labels), len(BUCKETS), len(BUCKETS))  # source, length, position
        cells = int(np.prod(self.shape))
        self._sums = torch.zeros(cells, dtype=torch.float64, device=world.device)
        self._tokens = np.zeros(cells)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Add the losses of a batch, [B, L], 0 where there is no label; does not wait for the device."""
        cells = self._cells(batch)
        self._sums.index_add_(0, torch.from_numpy(cells).to(self._sums.device), losses.flatten().to(self._sums))
        self._tokens += np.bincount(cells, (batch.labels != IGNORE).flatten(), minlength=len(self._tokens))

    def _cells(self, batch: Batch) -> np.ndarray:
        """Return the flat index of each token's cell in `self.shape`, int64 [B·L]."""
        B, L = batch.labels.shape
        sources = np.zeros(B, dtype=np.int64)
        sources[: len(batch.sources)] = batch.sources
        lengths = np.diff(batch.cu_seqlens)
        by_length = np.searchsorted(BOUNDS, lengths).repeat(lengths)
        by_position = np.searchsorted(BOUNDS, batch.position_ids.flatten(), side="right")
        return np.ravel_multi_index((sources.repeat(L), by_length, by_position), self.shape)

    def means(self) -> Means:
        """Return the means over all ranks; a collective call.

        Raises:
            UserError: no token has a label.
        """
        both = torch.stack([self._sums, torch.from_numpy(self._tokens).to(self._sums.device)])
        if self.world.size > 1:
            both = collectives.sum_over_ranks(both)
        sums, tokens = both.cpu().numpy().reshape(2, *self.shape)
        if not tokens.any():
            locations = ", ".join(dataset.location for dataset in self.sources.datasets)
            raise UserError(
                f"{locations} has no held-out token to predict; run `fusiontree data verify`, or rebuild it with a "
                "larger --holdout"
            )

        def by(names: tuple[str, ...], others: tuple[int, int]) -> dict[str, Mean]:
            parts = zip(names, sums.sum(others), tokens.sum(others), strict=True)
            return {name: Mean(float(part / count), int(count)) for name, part, count in parts if count}

        return Means(
            Mean(float(sums.sum() / tokens.sum()), int(tokens.sum())),
            by_source=by(self.labels, (1, 2)),
            by_length=by(BUCKETS, (0, 2)),
            by_position=by(BUCKETS, (0, 1)),
        )

    def figures(self) -> dict[str, float]:
        """Return the means as training logs them, in nats per token; a collective call.

        ``val_loss`` covers all tokens, ``val_loss/NAME`` one source, ``val_loss_by_length/BUCKET`` and
        ``val_loss_by_position/BUCKET`` one bucket. A split into a single part is left out.
        """
        means = self.means()
        figures = {"val_loss": means.total.loss}
        for prefix, parts in (
            ("val_loss", means.by_source),
            ("val_loss_by_length", means.by_length),
            ("val_loss_by_position", means.by_position),
        ):
            if len(parts) > 1:
                figures |= {f"{prefix}/{name}": part.loss for name, part in parts.items()}
        return figures


@torch.inference_mode()
def held_out_batches(
    model: HybridLM, held_out: Sources, seq_len: int, limit: int | None, note: str
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield held-out batches and the model's losses on them, nats, fp32 [B, L], 0 where there is no label.

    Args:
        seq_len: tokens per row.
        limit: maximum number of rows; None: all.
        note: label of the progress bar.

    Raises:
        RunError: a row is damaged.
    """
    tokens = 0
    with progress_bar() as bar:
        task = bar.add_task(note, total=None, note="")
        for batch in validation_batches(held_out, seq_len, ROWS_PER_FORWARD, 0, 1, limit):
            if batch.damaged:
                raise RunError(f"{batch.damaged[0]}; restore the shard or rebuild the dataset")
            ids, labels, documents = to_device(batch, model.embedding.weight.device)
            hidden, _ = model.hidden(ids, documents)
            yield batch, token_losses(hidden.flatten(0, 1), model.head_weight, labels.flatten()).view_as(labels)
            tokens += batch.real_tokens
            bar.update(task, advance=1, note=f"{tokens:,} tokens")


def held_out_loss(model: HybridLM, held_out: Sources, seq_len: int, limit: int | None, note: str) -> float:
    """Return the mean held-out loss, nats per token; arguments as in `held_out_batches`.

    Raises:
        UserError: no held-out token has a label. RunError: a row is damaged.
    """
    total = HeldOutLoss(held_out, World(0, 1, model.embedding.weight.device))
    for batch, losses in held_out_batches(model, held_out, seq_len, limit, note):
        total.add(batch, losses)
    return total.means().total.loss
