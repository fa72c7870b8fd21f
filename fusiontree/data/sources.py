"""The datasets that a run trains on, read as one: they must agree on what a token is."""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fusiontree.data.batch import BadRow, Batch
from fusiontree.data.format import Dataset
from fusiontree.data.remote import UnreachableError
from fusiontree.errors import RunError, UserError

RETRY_DELAYS = (0.05, 0.5)  # seconds before a row that could not be read is tried again


class Sources:
    """One split of several datasets.

    Args:
        datasets: by the name that the run gives them; "" for a dataset that stands alone.

    Raises:
        UserError: one is empty, or two do not agree on tokenizer, token type, special tokens or row length.
    """

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.names = tuple(datasets)
        self.datasets = tuple(datasets.values())
        for dataset in self.datasets:
            if dataset.num_rows == 0:
                raise UserError(f"{dataset.location}: split {dataset.split} is empty; build it from more documents")
            _require_alike(self.datasets[0], dataset)

    @property
    def row_len(self) -> int:
        """Tokens per packed row."""
        return self.datasets[0].manifest.row_len

    @property
    def dtype(self) -> np.dtype:
        """Of the stored tokens."""
        return np.dtype(self.datasets[0].manifest.dtype).newbyteorder("<")

    @property
    def pad_id(self) -> int:
        """The token that padding is filled with."""
        return self.datasets[0].manifest.tokenizer.pad_id

    @property
    def labels(self) -> tuple[str, ...]:
        """What each source is called in reports: the run's name for it, else the dataset's own."""
        return tuple(n or d.manifest.source for n, d in zip(self.names, self.datasets, strict=True))

    @property
    def fingerprint(self) -> str:
        """Changes when any byte of any shard does, or a name."""
        if self.names == ("",):
            return self.datasets[0].fingerprint
        lines = [f"{name} {dataset.fingerprint}" for name, dataset in zip(self.names, self.datasets, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, source: int, row: int) -> tuple[np.ndarray, np.ndarray, BadRow | None]:
        """Tokens [row_len] and segment ends, int32 [segments], of a packed row, and None.

        A row that cannot be read, or does not match its checksum, is tried again; then a row of padding alone comes in
        its place, and what was wrong.

        Raises:
            UnreachableError: the dataset's address does not answer. RefusedError: it does not let us read.
        """
        reason = ""
        for delay in (*RETRY_DELAYS, None):
            try:
                return *self.datasets[source].row(row), None
            except UnreachableError:
                raise
            except RunError:
                reason = "is damaged (checksum differs)"
            except OSError as error:
                reason = f"cannot be read ({error.strerror or error})"
            if delay is not None:
                time.sleep(delay)
        shard, number = self.datasets[source].place(row)
        tokens = np.full(self.row_len, self.pad_id, dtype=self.dtype)
        ends = np.array([-self.row_len], dtype=np.int32)
        return tokens, ends, BadRow(self.labels[source], shard.info.name, number, shard.where, reason)


class Ledger:
    """The stored rows that training met and could not use, each once.

    Args:
        limit: how many may be met before the run stops.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.rows: dict[BadRow, None] = {}  # of all ranks, as far as they have told one another
        self.unshared: list[BadRow] = []  # of this rank, that the others do not know

    def record(self, batches: Iterable[Batch]) -> None:
        """Enter what a rank's batches could not hold.

        Raises:
            RunError: that alone is more than the limit.
        """
        for row in (row for batch in batches for row in batch.damaged):
            if row not in self.rows and row not in self.unshared:
                self.unshared.append(row)
        self.check()

    def merge(self, unshared: Iterable[list[BadRow]]) -> list[BadRow]:
        """Enter what each rank has met since the last time; returns what is new."""
        new = [row for row in dict.fromkeys(row for rows in unshared for row in rows) if row not in self.rows]
        self.rows |= dict.fromkeys(new)
        self.unshared = []
        return new

    def restore(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Enter what a checkpoint has kept."""
        self.rows |= {BadRow(**entry): None for entry in entries}

    def check(self) -> None:
        """Raise RunError if there are more rows than the limit."""
        rows = [*self.rows, *self.unshared]
        if len(rows) > self.limit:
            raise RunError(
                f"{len(rows)} stored rows could not be used, more than data.max_bad_rows {self.limit}; the last: "
                f"{rows[-1]}; run `fusiontree data verify`, restore the shards and start again"
            )

    def to_json(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps."""
        return [asdict(row) for row in self.rows]


def _require_alike(one: Dataset, other: Dataset) -> None:
    """Raise UserError, naming both datasets, if a model cannot be trained on their rows alike."""
    first, second = one.manifest, other.manifest
    for what, a, b in (
        ("tokenizers", first.tokenizer.fingerprint[:12], second.tokenizer.fingerprint[:12]),
        ("vocabulary sizes", first.tokenizer.vocab_size, second.tokenizer.vocab_size),
        ("token types", first.dtype, second.dtype),
        ("end-of-document tokens", first.tokenizer.eos_id, second.tokenizer.eos_id),
        ("padding tokens", first.tokenizer.pad_id, second.tokenizer.pad_id),
        ("row lengths", first.row_len, second.row_len),
    ):
        if a != b:
            raise UserError(
                f"sources {one.location} and {other.location} have different {what} ({a}, {b}); build both alike"
            )
