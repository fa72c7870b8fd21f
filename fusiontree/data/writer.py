"""Writing of shards: packed rows into WebDataset tars, one index per tar (docs/format.md)."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusiontree.data.format import ShardInfo, index_path, row_crc
from fusiontree.data.invariants import SPLITS
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.segments import ENDS
from fusiontree.data.shard_scan import scan_shard
from fusiontree.errors import RunError
from fusiontree.files import write_atomic

GROUP_ROWS = 32  # rows per WebDataset sample: members of a megatoken read ten times as fast as single documents
SHARD_ROWS = 512


class ShardWriter:
    """Writer of a split as FOLDER/SPLIT/NNNNNN.tar with one index each; the same rows give the same bytes.

    Args:
        folder: the dataset folder; the caller writes the manifest.
        split: train or validation.
        source: name of the source, recorded in every sample.
        tokenizer: tokenizer fingerprint, recorded in every sample; "" if unknown.
        shard_rows: rows per shard; the last shard may have fewer.
        written: shards that exist already, when a build resumes.
        pending: rows that wait for the next shard, when a build resumes.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        source: str,
        tokenizer: str = "",
        shard_rows: int = SHARD_ROWS,
        written: Iterable[ShardInfo] = (),
        pending: Iterable[PackedRow] = (),
    ):
        assert split in SPLITS, split
        self.folder, self.split, self.shard_rows = folder, split, shard_rows
        self.metadata = {"source": source, "tokenizer": tokenizer}
        self.shards, self.pending = list(written), list(pending)
        (folder / split).mkdir(exist_ok=True)

    def add(self, rows: Iterable[PackedRow]) -> None:
        """Append rows, and write every shard that becomes full."""
        self.pending += rows
        while len(self.pending) >= self.shard_rows:
            self._write(self.pending[: self.shard_rows])
            self.pending = self.pending[self.shard_rows :]

    def finish(self) -> list[ShardInfo]:
        """Write the last shard and return all shards."""
        if self.pending:
            self._write(self.pending)
            self.pending = []
        return self.shards

    def _write(self, rows: list[PackedRow]) -> None:
        number = len(self.shards)
        name = f"{self.split}/{number:06d}.tar"
        path = self.folder / name
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as stream:
            write_tar(stream, rows, number * self.shard_rows, self.metadata)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        scan = scan_shard(path)  # the index describes the file on disk, not the rows in memory
        if scan.faults:
            raise RunError(f"{path}: {scan.faults[0]} right after writing; check the disk and rebuild the dataset")
        write_index(path, scan.index)
        self.shards.append(scan.info(name))


def write_tar(stream: BinaryIO, rows: list[PackedRow], first_row: int, metadata: dict[str, str]) -> None:
    """Write a shard.

    Args:
        stream: a file open for writing.
        rows: the shard's rows.
        first_row: number of the first row in the split.
        metadata: entries of every sample's KEY.json.
    """
    from webdataset.writer import TarWriter  # slow to import, and readers never need it

    # fields that would differ between two builds (time, user, umask) are fixed
    with TarWriter(stream, user="fusiontree", group="fusiontree", mode=0o644, mtime=0, encoder=False) as tar:
        for at in range(0, len(rows), GROUP_ROWS):
            group = rows[at : at + GROUP_ROWS]
            ends = np.zeros((len(group), max(len(row.ends) for row in group)), dtype=ENDS)
            for padded, row in zip(ends, group, strict=True):
                padded[: len(row.ends)] = row.ends
            tokens = np.stack([row.tokens for row in group])
            tokens = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
            crcs = [row_crc(row, kept.ends.astype(ENDS)) for row, kept in zip(tokens, group, strict=True)]
            sample = metadata | {"crc": crcs, "documents": [[_span_json(span) for span in row.spans] for row in group]}
            tar.write(
                {
                    "__key__": f"{first_row + at:09d}",
                    "ends.npy": _encode_array(ends),
                    "json": json.dumps(sample, separators=(",", ":")).encode(),
                    "tok.npy": _encode_array(tokens),
                }
            )


def _span_json(span: Span) -> dict[str, Any]:
    """Convert a span to its form in KEY.json; `continues` is present only if true."""
    values = {"id": span.id, "start": span.start, "length": span.length, "offset": span.offset}
    return values | ({"continues": True} if span.continues else {})


def write_index(shard: Path, index: np.ndarray) -> None:
    """Write the index of a shard."""
    write_atomic(index_path(shard), _encode_array(index))


def _encode_array(array: np.ndarray) -> bytes:
    """Encode an array as `np.save` does, with one copy of the array instead of three."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return b"".join([header.getvalue(), array.data])
