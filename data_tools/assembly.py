"""Assembly of encoded documents into shards, with a saved state from which an interrupted build resumes."""

import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.duplicates import DIGEST, SeenTexts
from data_tools.options import BuildOptions
from data_tools.readers import Record
from data_tools.skipped import SkipReport
from data_tools.workers import Encoded
from fusiontree.data.format import ShardInfo, TokenizerInfo, has_index, index_path
from fusiontree.data.invariants import SPLITS
from fusiontree.data.packing import WINDOW_DOCUMENTS, PackedRow, Packer
from fusiontree.data.writer import SHARD_ROWS, ShardWriter
from fusiontree.errors import RunError
from fusiontree.files import write_atomic

STATE, DIGESTS = "state.pickle", "digests.bin"
SOURCE = "default"
_CHECKSUM_BYTES = hashlib.sha256().digest_size  # at the head of the state file, before the pickle


class Position(NamedTuple):
    """The next record to read."""

    file: int  # index in the list of files
    record: int  # index in the file


@dataclass
class State:
    """Everything that the rest of a build depends on."""

    packers: dict[str, Packer]
    position: Position = field(default_factory=lambda: Position(0, 0))
    report: SkipReport = field(default_factory=SkipReport)
    tokens: int = 0  # in the packed documents
    cut: int = 0  # documents longer than a row
    duplicates: int = 0
    digests: int = 0  # valid digests in DIGESTS
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    pending: dict[str, list[PackedRow]] = field(default_factory=lambda: {split: [] for split in SPLITS})


def load_state(folder: Path) -> State:
    """Load the state that `Assembly.save` wrote to a dataset folder.

    Raises:
        RunError: the state is damaged, or a shard, an index or the digests do not match it.
    """
    content = (folder / STATE).read_bytes()
    checksum, content = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise state_mismatch(folder / STATE)
    state: State = pickle.loads(content)
    for shard in (shard for shards in state.shards.values() for shard in shards):
        if _size(folder / shard.name) != shard.bytes:
            raise state_mismatch(folder / shard.name)
        if not has_index(folder, shard):
            raise state_mismatch(index_path(folder / shard.name))
    if _size(folder / DIGESTS) < state.digests * DIGEST.itemsize:
        raise state_mismatch(folder / DIGESTS)
    return state


def state_mismatch(path: Path) -> RunError:
    """Return the error for a file that an interrupted build cannot resume from."""
    return RunError(f"{path} is missing, damaged or changed since the interruption; pass --overwrite to restart")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class Assembly:
    """Packing of documents in their order, and writing of the shards.

    Args:
        folder: the dataset folder.
        info: of the tokenizer.
        options: of the build.
        held_out_files: names of the files whose documents form the validation split; None: `options.holdout` of all
            documents, at even distances.
        state: the state to resume from; None: `folder` contains no shards.
    """

    def __init__(
        self,
        folder: Path,
        info: TokenizerInfo,
        options: BuildOptions,
        held_out_files: frozenset[str] | None = None,
        state: State | None = None,
    ):
        self.folder = folder
        self.resumed = state is not None
        self._options, self._held_out_files = options, held_out_files
        packers = {split: Packer(options.row_len, info.pad_id, window=WINDOW_DOCUMENTS) for split in SPLITS}
        self.state = state or State(packers)
        self._seen = SeenTexts(folder / DIGESTS, self.state.digests) if options.dedup else None
        self._remove_unsaved_shards()
        self._writers = {
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
    def position(self) -> Position:
        """The next record to add."""
        return self.state.position

    @property
    def tokens(self) -> int:
        """Tokens of the documents added so far."""
        return self.state.tokens

    @property
    def report(self) -> SkipReport:
        """Counts of the records added so far."""
        return self.state.report

    def add(self, records: Sequence[Record], encoded: Encoded, position: Position) -> None:
        """Add records; `position` is that of the record after them."""
        new = None if self._seen is None else self._seen.add(encoded.digests).tolist()
        at = documents = 0
        for number, (record, length) in enumerate(zip(records, encoded.lengths, strict=True)):
            if not length:
                self.report.add_record(record, encoded.reasons[number])
                continue
            tokens = encoded.tokens[at : at + length]
            at, documents = at + length, documents + 1
            if new is not None and not new[documents - 1]:
                self.state.duplicates += 1
            else:
                self._pack(record, tokens)
        self.state.position = position

    def _pack(self, record: Record, tokens: np.ndarray) -> None:
        if self._held_out_files is not None:
            held_out = record.file in self._held_out_files
        else:
            held_out = _is_held_out(self.report.documents, self._options.holdout)
        split = SPLITS[held_out]
        self.report.documents += 1
        self.state.tokens += len(tokens)
        self.state.cut += len(tokens) > self._options.row_len
        self._writers[split].add(self.state.packers[split].add(record.id, tokens))

    def save(self) -> None:
        """Make the work so far durable; a build that ends after this call, even killed, resumes from here."""
        state = self.state
        for split, writer in self._writers.items():
            state.shards[split], state.pending[split] = writer.shards, writer.pending
        if self._seen is not None:
            self._seen.save()
            state.digests = self._seen.count
        content = pickle.dumps(state)
        write_atomic(self.folder / STATE, hashlib.sha256(content).digest() + content)

    def finish(self) -> dict[str, list[ShardInfo]]:
        """Write the pending documents and return the shards by split."""
        for split, writer in self._writers.items():
            writer.add(self.state.packers[split].finish())
            writer.finish()
        return {split: writer.shards for split, writer in self._writers.items()}

    def _remove_unsaved_shards(self) -> None:
        """Remove files written after the state was saved."""
        for split in SPLITS:
            known = {self.folder / shard.name for shard in self.state.shards[split]}
            known |= {index_path(path) for path in known}
            for path in (self.folder / split).glob("*"):
                if path not in known:
                    path.unlink()


def _is_held_out(number: int, share: float) -> bool:
    """Return whether document `number` is held out: the second document, then every 1/share-th; never all of them."""
    return number > 0 and math.ceil(number * share) > math.ceil((number - 1) * share)
