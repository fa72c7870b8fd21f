"""The datasets of a run, read as one; they must agree on tokenizer, token type and row length."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fusiontree.data import segments
from fusiontree.data.batch import BadRow, Batch
from fusiontree.data.format import DamagedRowError, Dataset
from fusiontree.data.remote import UnreachableError
from fusiontree.errors import RunError, UserError, short_cause

RETRY_DELAYS = (0.05, 0.5)  # seconds before each retry of a row that could not be read


class Sources:
    """One split of several datasets.

    Args:
        datasets: each by its name in the run; "" for the single unnamed dataset of data.path.

    Raises:
        UserError: one has no tokens, or two disagree on tokenizer, token type, special tokens or row length.
    """

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.names = tuple(datasets)
        self.datasets = tuple(datasets.values())
        for dataset in self.datasets:
            if not dataset.valid_tokens.any():
                raise UserError(f"{dataset.location}: split {dataset.split} is empty; build it from more documents")
            _require_compatible(self.datasets[0], dataset)

    @property
    def row_len(self) -> int:
        """Tokens per packed row."""
        return self.datasets[0].manifest.row_len

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored tokens."""
        return np.dtype(self.datasets[0].manifest.dtype).newbyteorder("<")

    @property
    def pad_id(self) -> int:
        """Padding token."""
        return self.datasets[0].manifest.tokenizer.pad_id

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each source in reports: its name in the run, or else the dataset's own."""
        return tuple(n or d.manifest.source for n, d in zip(self.names, self.datasets, strict=True))

    @property
    def fingerprint(self) -> str:
        """Digest of the sources: it changes with any byte of any shard, and with any name."""
        if self.names == ("",):
            return self.datasets[0].fingerprint
        lines = [f"{name} {dataset.fingerprint}" for name, dataset in zip(self.names, self.datasets, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, source: int, row: int) -> tuple[np.ndarray, np.ndarray, BadRow | None]:
        """Read a packed row: tokens [row_len], segment ends, int32 [segments], and None.

        A row that cannot be read, or fails its checksum, is retried. If all retries fail, the result is a row of
        padding and a `BadRow` with the reason.

        Raises:
            UnreachableError: the dataset's address does not respond. AccessDeniedError: it denies access.
        """
        reason = ""
        for delay in (*RETRY_DELAYS, None):
            try:
                return *self.datasets[source].row(row), None
            except UnreachableError:
                raise
            except DamagedRowError as error:
                reason = error.fault
            except OSError as error:
                reason = f"cannot be read ({short_cause(error)})"
            if delay is not None:
                time.sleep(delay)
        shard, number = self.datasets[source].place(row)
        tokens = np.full(self.row_len, self.pad_id, dtype=self.dtype)
        damage = BadRow(self.labels[source], shard.info.name, number, shard.where, reason)
        return tokens, segments.only_padding(self.row_len), damage


def held_out_sources(datasets: Mapping[str, Dataset], remedy: str = "") -> Sources:
    """Return the sources of validation splits, leaving out datasets without held-out tokens.

    Args:
        datasets: validation splits by name, as for `Sources`.
        remedy: an alternative remedy, appended to the error.

    Raises:
        UserError: no dataset has held-out tokens, or they differ in tokenizer, token type or row length.
    """
    found = {name: dataset for name, dataset in datasets.items() if dataset.valid_tokens.any()}
    if not found:
        where = ", ".join(dataset.location for dataset in datasets.values())
        raise UserError(
            f"{where}: no held-out rows; rebuild with a larger --holdout from at least two documents{remedy}"
        )
    return Sources(found)


class Ledger:
    """The damaged stored rows that training has met, each counted once.

    Args:
        limit: maximum number of such rows before the run stops.
        share: maximum share of the rows of a source in a split, likewise. One row is tolerated, unless it is the only
            one.
        splits: the splits that the rows are from.
    """

    def __init__(self, limit: int, share: float = 1.0, splits: Iterable[Sources] = ()):
        self.limit, self.share = limit, share
        self._totals = {  # rows by source and split
            (label, dataset.split): dataset.num_rows
            for sources in splits
            for label, dataset in zip(sources.labels, sources.datasets, strict=True)
        }
        self.rows: dict[BadRow, None] = {}  # of all ranks, up to the last `merge`
        self.unshared: list[BadRow] = []  # of this rank, since the last `merge`

    def record(self, batches: Iterable[Batch]) -> None:
        """Record the damaged rows of this rank's batches.

        Raises:
            RunError: the rows known to this rank exceed a limit.
        """
        for row in (row for batch in batches for row in batch.damaged):
            if row not in self.rows and row not in self.unshared:
                self.unshared.append(row)
        self.check()

    def merge(self, unshared: Iterable[list[BadRow]]) -> list[BadRow]:
        """Merge the unshared rows of all ranks, and return those that are new."""
        new = [row for row in dict.fromkeys(row for rows in unshared for row in rows) if row not in self.rows]
        self.rows |= dict.fromkeys(new)
        self.unshared = []
        return new

    def restore(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of a checkpoint, in the form of `to_json`."""
        self.rows |= {BadRow(**entry): None for entry in entries}

    def check(self) -> None:
        """Raise RunError if the rows exceed a limit."""
        rows = [*self.rows, *self.unshared]
        excess = f"more than data.max_bad_rows {self.limit}" if len(rows) > self.limit else ""
        for (source, split), count in Counter((row.source, row.split) for row in rows).items():
            total = self._totals.get((source, split), 0)  # 0: the source was removed since the checkpoint
            if total and count > min(max(1, int(self.share * total)), total - 1):
                excess = f"{count} of the {total} {split} rows of {source}; data.max_bad_share is {self.share:g}"
        if excess:
            raise RunError(
                f"{len(rows)} stored rows could not be used, {excess}; the last: {rows[-1]}; run `fusiontree data "
                "verify`, restore the shards and start again"
            )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows for a checkpoint."""
        return [asdict(row) for row in self.rows]


def _require_compatible(one: Dataset, other: Dataset) -> None:
    """Raise UserError, naming both datasets, unless one model can train on the rows of both."""
    first, second = one.manifest, other.manifest
    for kind, a, b in (
        ("tokenizers", first.tokenizer.fingerprint[:12], second.tokenizer.fingerprint[:12]),
        ("vocabulary sizes", first.tokenizer.vocab_size, second.tokenizer.vocab_size),
        ("token types", first.dtype, second.dtype),
        ("end-of-document tokens", first.tokenizer.eos_id, second.tokenizer.eos_id),
        ("padding tokens", first.tokenizer.pad_id, second.tokenizer.pad_id),
        ("row lengths", first.row_len, second.row_len),
    ):
        if a != b:
            raise UserError(
                f"sources {one.location} and {other.location} have different {kind} ({a}, {b}); "
                "build both with the same settings"
            )
