"""Loss on the held-out rows: of all their tokens, and of parts of them."""

import numpy as np
import torch
from torch import Tensor

from fusiontree.data.batch import IGNORE, Batch
from fusiontree.data.sources import Sources
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World

BOUNDS = (256, 1024, 4096, 16_384, 65_536)  # tokens; a bucket ends with its bound, the last has none
BUCKETS = ("0-256", "256-1K", "1K-4K", "4K-16K", "16K-64K", "64K+")


class HeldOutLoss:
    """Sums the losses of tokens by source, by the length of their document and by their place in it.

    A document that was cut to fit a row counts as long as the piece in the row, which is all that the model sees. The
    sums are fp64 and of the same tokens for any number of ranks.
    """

    def __init__(self, sources: Sources, world: World):
        self.labels, self.world = sources.labels, world
        self.shape = (len(self.labels), len(BUCKETS), len(BUCKETS))  # source, length, position
        cells = int(np.prod(self.shape))
        self._sums = torch.zeros(cells, dtype=torch.float64, device=world.device)
        self._tokens = np.zeros(cells)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Take in the losses of a batch, [B, L], 0 where there is no label; without waiting for the device."""
        cells = self._cells(batch)
        self._sums.index_add_(0, torch.from_numpy(cells).to(self._sums.device), losses.flatten().double())
        self._tokens += np.bincount(cells, (batch.labels != IGNORE).flatten(), minlength=len(self._tokens))

    def _cells(self, batch: Batch) -> np.ndarray:
        """The number of each token's cell, int64 [B·L]."""
        B, L = batch.labels.shape
        sources = np.zeros(B, dtype=np.int64)
        sources[: len(batch.sources)] = batch.sources
        lengths = np.diff(batch.cu_seqlens)
        by_length = np.searchsorted(BOUNDS, lengths).repeat(lengths)
        by_position = np.searchsorted(BOUNDS, batch.position_ids.flatten(), side="right")
        return np.ravel_multi_index((sources.repeat(L), by_length, by_position), self.shape)

    def figures(self) -> dict[str, float]:
        """Mean losses in nats per token, over all ranks, which call it together.

        ``val_loss`` is that of all tokens; ``val_loss/NAME`` of a source, where there are several;
        ``val_loss_by_length/BUCKET`` and ``val_loss_by_position/BUCKET`` where more than one bucket has tokens.
        """
        both = torch.stack([self._sums, torch.from_numpy(self._tokens).to(self._sums.device)])
        sums, tokens = collectives.sum_over_ranks(both).cpu().numpy().reshape(2, *self.shape)
        figures = {"val_loss": float(sums.sum() / max(1, tokens.sum()))}
        for prefix, names, others in (
            ("val_loss", self.labels, (1, 2)),
            ("val_loss_by_length", BUCKETS, (0, 2)),
            ("val_loss_by_position", BUCKETS, (0, 1)),
        ):
            parts = zip(names, sums.sum(others), tokens.sum(others), strict=True)
            means = {f"{prefix}/{name}": float(part / count) for name, part, count in parts if count}
            figures |= means if len(means) > 1 else {}
        return figures
