"""Encoded documents into shards, one after another, with a state that an interrupted build goes on from."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.duplicates import SeenTexts
from data_tools.readers import Record
from data_tools.report import Report
from data_tools.workers import Encoded
from fusiontree.data.format import SPLITS, ShardInfo, TokenizerInfo
from fusiontree.data.packing import WINDOW_DOCUMENTS, PackedRow, Packer
from fusiontree.data.writer import SHARD_ROWS, ShardWriter
from fusiontree.errors import RunError
from fusiontree.files import write_atomic

STATE, DIGESTS = "state.pickle", "digests.bin"
SOURCE = "default"


@dataclass
class _State:
    """All that the rest of a build depends on."""

    packers: dict[str, Packer]
    position: tuple[int, int] = (0, 0)  # file, and record of it, that comes next
    report: Report = field(default_factory=Report)
    tokens: int = 0  # of the documents taken
    cut: int = 0  # documents longer than a row
    duplicates: int = 0
    digests: int = 0  # texts seen
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    pending: dict[str, list[PackedRow]] = field(default_factory=lambda: {split: [] for split in SPLITS})


class Assembly:
    """Takes documents in order and writes their shards.

    Args:
        folder: the dataset folder; a state in it is gone on from.
        info: of the tokenizer.
        row_len: tokens per row.
        holdout: share of the documents that make the validation split, spread evenly over them; or the names of the
            files whose documents do.
        dedup: whether a document whose text came before is left out.
    """

    def __init__(self, folder: Path, info: TokenizerInfo, row_len: int, holdout: float | frozenset[str], dedup: bool):
        self.folder, self.row_len, self.holdout = folder, row_len, holdout
        self.continued = (folder / STATE).exists()
        if self.continued:
            self.state: _State = pickle.loads((folder / STATE).read_bytes())
        else:
            packers = {s: Packer(row_len, info.pad_id, window=WINDOW_DOCUMENTS) for s in SPLITS}
            self.state = _State(packers)
        self.seen = SeenTexts(folder / DIGESTS, self.state.digests) if dedup else None
        self._remove_unknown()
        self.writers = {
            split: ShardWriter(
                folder,
                split,
                SOURCE,
                info.fingerprint,
                SHARD_ROWS,
                self.state.shards[split],
                self.state.pending[split],
            )
            for split in SPLITS
        }

    @property
    def position(self) -> tuple[int, int]:
        """File, and record of it, that comes next."""
        return self.state.position

    @property
    def tokens(self) -> int:
        """Tokens of the documents so far."""
        return self.state.tokens

    @property
    def report(self) -> Report:
        """What became of the records so far."""
        return self.state.report

    def take(self, records: Sequence[Record], encoded: Encoded, position: tuple[int, int]) -> None:
        """Take records in; `position` is what comes after them."""
        new = None if self.seen is None else self.seen.add(encoded.digests).tolist()
        at = documents = 0
        for number, (record, length) in enumerate(zip(records, encoded.lengths, strict=True)):
            if not length:
                self.report.reject(record, encoded.reasons[number])
                continue
            tokens = encoded.tokens[at : at + length]
            at, documents = at + length, documents + 1
            if new is not None and not new[documents - 1]:
                self.state.duplicates += 1
            else:
                self._pack(record, tokens)
        self.state.position = position

    def _pack(self, record: Record, tokens: np.ndarray) -> None:
        if isinstance(self.holdout, frozenset):
            held_out = record.file in self.holdout
        else:
            held_out = _is_held_out(self.report.documents, self.holdout)
        split = SPLITS[held_out]
        self.report.documents += 1
        self.state.tokens += len(tokens)
        self.state.cut += len(tokens) > self.row_len
        self.writers[split].add(self.state.packers[split].add(record.id, tokens))

    def save(self) -> None:
        """Make the work so far durable: a build that ends now, however it ends, goes on from here."""
        state = self.state
        for split, writer in self.writers.items():
            state.shards[split], state.pending[split] = writer.shards, writer.pending
        if self.seen is not None:
            self.seen.save()
            state.digests = self.seen.count
        write_atomic(self.folder / STATE, pickle.dumps(state))

    def finish(self) -> dict[str, list[ShardInfo]]:
        """Write what is left; returns the shards by split."""
        for split, writer in self.writers.items():
            writer.add(self.state.packers[split].finish())
            writer.finish()
        return {split: writer.shards for split, writer in self.writers.items()}

    def _remove_unknown(self) -> None:
        """Remove what was written after the state; RunError if what it counts on is gone."""
        for split in SPLITS:
            known = {self.folder / shard.name: shard.bytes for shard in self.state.shards[split]}
            for path, size in known.items():
                if not path.is_file() or path.stat().st_size != size:
                    raise RunError(f"{path} is not as this build left it; run again with --overwrite to start again")
            known |= {path.with_suffix(".idx"): 0 for path in known}
            for path in (self.folder / split).glob("*"):
                if path not in known:
                    path.unlink()


def _is_held_out(number: int, share: float) -> bool:
    """Whether document `number` is held out: the second one, then every 1/share-th; so one of two, and never all."""
    return number > 0 and math.ceil(number * share) > math.ceil((number - 1) * share)
