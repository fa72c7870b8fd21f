"""Damaged shards are refused at the start; rows damaged later are masked in place, named, counted, never trained on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import counting_dataset, metrics, settings
from ranks import run as run_ranks

from fusiontree.checkpoint import store
from fusiontree.data import sources as sources_module
from fusiontree.data.batch import IGNORE, BadRow, Batch
from fusiontree.data.format import Dataset, index_path
from fusiontree.data.sources import Ledger, Sources
from fusiontree.data.stream import TrainStream, single_source_recipe, validation_batches
from fusiontree.errors import RunError, UserError

ROW, ROWS = 32, 100  # shards of 40, 40 and 20 rows


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    counting_dataset(tmp_path / "set", ROWS, 2)
    return tmp_path / "set"


def edit(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def epoch(dataset: Dataset, seq_len: int = 16, workers: int = 0) -> list[Batch]:
    """Return all batches of an epoch, of 10 packed rows each."""
    recipe = single_source_recipe(3, 10 * ROW, seq_len)
    stream = TrainStream(Sources({"": dataset}), recipe, 10 * ROW // seq_len, workers=workers)
    batches = [batch for _ in range(ROWS // 10) for batch in next(stream)]
    stream.close()
    return batches


def compare(folder: Path, damaged: list[Batch], rows: set[int]) -> None:
    """Check that `damaged` equals the batches of the intact dataset, except that exactly `rows` are masked in place."""
    twin = folder.parent / "twin"
    intact = epoch(counting_dataset(twin, ROWS, 2))
    masked = set()
    for one, other in zip(intact, damaged, strict=True):
        for i, (tokens, stored) in enumerate(zip(one.input_ids, (one.input_ids[:, 0] - 2) // ROW, strict=True)):
            if stored in rows:
                masked.add(int(stored))
                assert (other.labels[i] == IGNORE).all()
                assert (other.input_ids[i] == 1).all()
            else:
                assert (other.input_ids[i] == tokens).all()
                assert (other.labels[i] == one.labels[i]).all()
    assert masked == rows
    named = {(bad.location, bad.row) for batch in damaged for bad in batch.damaged}
    assert named == {(str(folder / f"train/{row // 40:06d}.tar"), row % 40) for row in rows}


@pytest.mark.parametrize("field", ["tokens", "ends"])
@pytest.mark.parametrize("workers", [0, 2])
def test_flipped_bit_masks_its_row_and_no_other(folder: Path, field: str, workers: int) -> None:
    shard = Dataset(folder).shards[1]
    offset = int(shard.index[field][33])
    edit(shard.path, offset, bytes([shard.path.read_bytes()[offset] ^ 4]))
    batches = epoch(Dataset(folder), workers=workers)
    compare(folder, batches, {73})
    (reason,) = {bad.reason for batch in batches for bad in batch.damaged}
    assert reason == "is damaged (checksum differs)"
    assert sum(len(batch.damaged) for batch in batches) in (1, 2)  # once per batch with a slice of the row


def test_zeroed_tar_header_masks_no_row(folder: Path) -> None:
    shard = Dataset(folder).shards[0]
    for row in (0, 32):  # the headers of both samples' tokens
        edit(shard.path, int(shard.index["tokens"][row]) - 128 - 512, bytes(512))
    compare(folder, epoch(Dataset(folder)), set())


def test_shard_truncated_during_training_loses_the_rows_after_the_cut(folder: Path) -> None:
    dataset = Dataset(folder)
    os.truncate(dataset.shards[1].path, int(dataset.shards[1].index["tokens"][20]) + 10)
    compare(folder, epoch(dataset), {*range(60, 80)})


def test_shard_deleted_during_training_is_named(folder: Path) -> None:
    dataset = Dataset(folder)
    dataset.shards[2].path.unlink()
    batches = epoch(dataset)
    compare(folder, batches, {*range(80, 100)})
    assert "cannot be read (No such file or directory)" in {bad.reason for b in batches for bad in b.damaged}


def test_rows_changed_after_the_build_are_masked(folder: Path) -> None:
    shard = Dataset(folder).shards[0]
    edit(shard.path, int(shard.index["tokens"][3]), np.arange(2 * ROW, dtype=np.uint16).tobytes())
    compare(folder, epoch(Dataset(folder)), {3, 4})


def test_row_that_a_retry_reads_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, failures = Dataset(folder), {7: 2, 55: 1}
    read = dataset.row

    def shaky(row: int) -> tuple[np.ndarray, np.ndarray]:
        if failures.get(row, 0):
            failures[row] -= 1
            raise OSError(5, "Input/output error")
        return read(row)

    monkeypatch.setattr(dataset, "row", shaky)
    compare(folder, epoch(dataset), set())
    assert failures == {7: 0, 55: 0}


# --- refused at the start --------------------------------------------------------------------------------------------


def change_index(folder: Path, field: str, by: int) -> None:
    path = index_path(folder / "train/000001.tar")
    index = np.load(path)
    index[field] += by
    path.write_bytes(path.read_bytes()[: -index.nbytes] + index.tobytes())


def size_of_tar(folder: Path) -> int:
    return (folder / "train/000001.tar").stat().st_size


def replace(folder: Path, *endings: str) -> None:
    """Replace the second shard's files by another dataset's, which differ only in content."""
    other = counting_dataset(folder.parent / "other", ROWS, 30_000).folder
    assert size_of_tar(other) == size_of_tar(folder)
    for ending in endings:
        shutil.copy(other / f"train/000001.{ending}", folder / "train")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: change_index(folder, "valid", 1),
            r"000001\.idx is not the index that the manifest lists for .*000001\.tar \(sha256 differs\)",
        ),
        (
            lambda folder: replace(folder, "tar", "idx"),
            r"000001\.idx is not the index that the manifest lists for .*000001\.tar \(sha256 differs\)",
        ),
        (
            lambda folder: (folder / "train/000001.tar").write_bytes(bytes(size_of_tar(folder))),
            r"000001\.tar is not the shard that .*000001\.idx describes \(it contains other rows\)",
        ),
        (lambda folder: edit(folder / "train/000001.idx", 0, bytes(64)), r"000001\.idx is not a shard index"),
        (lambda folder: os.truncate(folder / "train/000001.tar", 5000), r"000001\.tar has 5000 bytes, not"),
        (lambda folder: (folder / "train/000001.tar").unlink(), r"000001\.tar is missing"),
        (lambda folder: (folder / "train/000001.idx").unlink(), r"000001\.idx is missing"),
    ],
)
def test_damage_visible_at_the_start_is_refused_by_name(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        Dataset(folder)
    assert "\n" not in str(caught.value)


# --- the ledger ------------------------------------------------------------------------------------------------------


def bad(row: int, where: str = "data", reason: str = "is damaged") -> BadRow:
    return BadRow("web", "train/0.tar", row, f"{where}/train/0.tar", reason)


def batch_with(*rows: BadRow) -> Batch:
    empty = np.zeros((1, 1), dtype=np.int64)
    return Batch(empty, empty, empty, empty, empty, 1, rows)


def test_ledger_counts_each_row_once_over_all_ranks_and_resumes() -> None:
    one, other = Ledger(3), Ledger(3)
    one.record([batch_with(bad(1)), batch_with(bad(1), bad(2))])
    other.record([batch_with(bad(2))])
    gathered = [one.unshared, other.unshared]
    assert one.merge(gathered) == other.merge(gathered) == [bad(1), bad(2)]
    one.record([batch_with(bad(2))])
    assert one.unshared == []
    again = Ledger(3)
    again.restore(json.loads(json.dumps(one.to_json())))
    again.record([batch_with(bad(1, "moved", "cannot be read"), bad(3))])
    with pytest.raises(RunError, match=r"4 stored rows .* data\.max_bad_rows 3; the last: data/train/0\.tar: row 9"):
        again.record([batch_with(bad(9))])


def test_damaged_validation_rows_are_masked_and_named(tmp_path: Path, shards: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = Dataset(copy, "validation").shards[0]
    edit(shard.path, int(shard.index["tokens"][0]), b"\xff\xff")
    batches = list(validation_batches(Sources({"": Dataset(copy, "validation")}), 512, 1, 0, 1))
    assert [bad.row for batch in batches for bad in batch.damaged] == [0]
    assert batches[0].real_tokens == 0 < batches[1].real_tokens


# --- a run with damaged shards ---------------------------------------------------------------------------------------


def test_training_continues_over_damage_reports_and_stores_it(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = Dataset(copy).shards[0]
    for row in (1, 5):
        edit(shard.path, int(shard.index["tokens"][row]) + 100, b"\xff\xff\xff")
    steps = -(-shard.info.rows * 512 // 4096)  # an epoch reads every stored row
    changes = {"batch__tokens": 4096, "schedule__steps": steps, "validation__every": 0, "checkpoint__every": 100}
    said = run_ranks(["train", "tiny", *settings(copy, tmp_path / "runs", name="r", **changes)], tmp_path, 2)
    run = tmp_path / "runs" / "r"
    kept = store.read_state(run / "checkpoints" / f"step-{steps}")["bad_rows"]
    assert sorted((entry["shard"], entry["row"]) for entry in kept) == [(shard.info.name, 1), (shard.info.name, 5)]
    for row in (1, 5):
        line = (
            f"{shard.path}: row {row} is damaged (checksum differs): replaced by a masked row (limit: data.max_bad_rows"
        )
        assert line in said
    assert all(np.isfinite(line["loss"]) for line in metrics(run))
