"""Held-out losses by source, length and position are the means of exactly the tokens in their bucket."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusiontree.data.batch import IGNORE, Batch, collate
from fusiontree.distributed.collectives import World
from fusiontree.evaluate import held_out as held_out_module
from fusiontree.evaluate.held_out import BOUNDS, BUCKETS, HeldOutLoss

SMALL_BOUNDS = (2, 4, 8, 16, 32)
WORLD = World(0, 1, torch.device("cpu"))


def batches(draw: np.random.Generator, count: int, rows: int = 3, L: int = 64) -> list[Batch]:
    """Return batches of random documents and padding; the last batch has a filler row."""
    found = []
    for number in range(count):
        ends = []
        for _ in range(rows):
            cuts = np.unique(draw.integers(1, L, size=draw.integers(1, 9)))
            ends.append(np.array([*cuts, -L], dtype=np.int32))
        last = number == count - 1
        if last:
            ends[-1] = np.array([-L], dtype=np.int32)
        sources = tuple(draw.integers(2, size=rows - last).tolist())
        found.append(collate(draw.integers(50, size=(rows, L)), ends, sources=sources))
    return found


def token_by_token(seen: list[Batch], losses: list[torch.Tensor]) -> dict[str, float]:
    """Return the figures from a plain loop over the tokens."""
    parts: dict[str, list[float]] = defaultdict(list)

    def bucket(tokens: int) -> str:
        return BUCKETS[sum(tokens > bound for bound in SMALL_BOUNDS)]

    for batch, loss in zip(seen, losses, strict=True):
        B, L = batch.labels.shape
        for row in range(B):
            for column in range(L):
                if batch.labels[row, column] == IGNORE:
                    continue
                length = int((batch.seq_idx[row] == batch.seq_idx[row, column]).sum())
                names = [
                    "val_loss",
                    f"val_loss/{'ab'[batch.sources[row]]}",
                    f"val_loss_by_length/{bucket(length)}",
                    f"val_loss_by_position/{bucket(int(batch.position_ids[row, column]) + 1)}",
                ]
                for name in names:
                    parts[name].append(loss[row, column].item())
    return {name: float(np.mean(values)) for name, values in parts.items()}


def held_out(labels: tuple[str, ...], seen: list[Batch], losses: list[torch.Tensor]) -> dict[str, float]:
    sources: Any = SimpleNamespace(labels=labels)
    total = HeldOutLoss(sources, WORLD)
    for batch, loss in zip(seen, losses, strict=True):
        total.add(batch, loss)
    return total.figures()


def test_figures_match_a_loop_over_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_module, "BOUNDS", SMALL_BOUNDS)
    draw = np.random.default_rng(0)
    seen = batches(draw, 4)
    losses = [torch.from_numpy(draw.random(b.labels.shape, dtype=np.float32) * (b.labels != IGNORE)) for b in seen]
    expected = token_by_token(seen, losses)
    assert len(expected) > 10
    assert held_out(("a", "b"), seen, losses) == pytest.approx(expected)


def test_a_single_source_and_bucket_is_not_reported() -> None:
    draw = np.random.default_rng(1)
    seen = [collate(draw.integers(50, size=(1, 64)), [np.array([40, 64], dtype=np.int32)], sources=(0,))]
    losses = [torch.rand(1, 64)]
    assert set(held_out(("a",), seen, losses)) == {"val_loss"}


def test_buckets_are_named_by_their_bounds() -> None:
    units = {"K": 1024}
    upper = [name.partition("-")[2] for name in BUCKETS[:-1]]
    assert [int(n.rstrip("K")) * units.get(n[-1], 1) for n in upper] == list(BOUNDS)
    assert [name.partition("-")[0] for name in BUCKETS[1:-1]] == upper[:-1]
    assert BUCKETS[-1] == f"{upper[-1]}+"
