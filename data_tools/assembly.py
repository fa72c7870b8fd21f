"""Encoded documents into shards, one after another, with a state that an interrupted build goes on from."""

import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.duplicates import DIGEST, SeenTexts
from data_tools.readers import Record
from data_tools.skipped import Report
from data_tools.workers import Encoded
from fusiontree.data.format import SPLITS, ShardInfo, TokenizerInfo, has_index, index_path
from fusiontree.data.packing import WINDOW_DOCUMENTS, PackedRow, Packer
from fusiontree.data.writer import SHARD_ROWS, ShardWriter
from fusiontree.errors import RunError
from fusiontree.files import write_atomic

STATE, DIGESTS = "state.pickle", "digests.bin"
SOURCE = "default"
_SEAL = hashlib.sha256().digest_size  # bytes before the pickled state, which a damaged one does not match


@dataclass
class State:
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


def load_state(folder: Path) -> State:
    """What `Assembly.save` has kept in a dataset folder.

    Raises:
        RunError: it, or a file that it counts on, is not as it was left.
    """
    content = (folder / STATE).read_bytes()
    seal, content = content[:_SEAL], content[_SEAL:]
    if hashlib.sha256(content).digest() != seal:
        raise not_as_left(folder / STATE)
    state: State = pickle.loads(content)
    for shard in (shard for shards in state.shards.values() for shard in shards):
        if _size(folder / shard.name) != shard.bytes:
            raise not_as_left(folder / shard.name)
        if not has_index(folder, shard):
            raise not_as_left(index_path(folder / shard.name))
    if _size(folder / DIGESTS) < state.digests * DIGEST.itemsize:
        raise not_as_left(folder / DIGESTS)
    return state


def not_as_left(path: Path) -> RunError:
    """The refusal to go on from a file."""
    return RunError(f"{path} is not as this build left it; run again with --overwrite to start again")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class Assembly:
    """Takes documents in order and writes their shards.

    Args:
        folder: the dataset folder.
        info: of the tokenizer.
        row_len: tokens per row.
        holdout: share of the documents that make the validation split, spread evenly over them; or the names of the
            files whose documents do.
        dedup: whether a document whose text came before is left out.
        state: what to go on from; None: nothing is in `folder` yet.
    """

    def __init__(
        self,
        folder: Path,
        info: TokenizerInfo,
        row_len: int,
        holdout: float | frozenset[str],
        dedup: bool,
        state: State | None = None,
    ):
        self.folder, self.row_len, self.holdout = folder, row_len, holdout
        self.continued = state is not None
        self.state = state or State({s: Packer(row_len, info.pad_id, window=WINDOW_DOCUMENTS) for s in SPLITS})
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
        content = pickle.dumps(state)
        write_atomic(self.folder / STATE, hashlib.sha256(content).digest() + content)

    def finish(self) -> dict[str, list[ShardInfo]]:
        """Write what is left; returns the shards by split."""
        for split, writer in self.writers.items():
            writer.add(self.state.packers[split].finish())
            writer.finish()
        return {split: writer.shards for split, writer in self.writers.items()}

    def _remove_unknown(self) -> None:
        """Remove what was written after the state."""
        for split in SPLITS:
            known = {self.folder / shard.name for shard in self.state.shards[split]}
            known |= {index_path(path) for path in known}
            for path in (self.folder / split).glob("*"):
                if path not in known:
                    path.unlink()


def _is_held_out(number: int, share: float) -> bool:
    """Whether document `number` is held out: the second one, then every 1/share-th; so one of two, and never all."""
    return number > 0 and math.ceil(number * share) > math.ceil((number - 1) * share)
