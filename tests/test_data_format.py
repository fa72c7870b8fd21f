"""The dataset on disk: any WebDataset reader reads it; damaged, incomplete and foreign datasets are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import write_split

from fusiontree.data.format import Dataset, Manifest, TokenizerInfo, token_dtype
from fusiontree.data.packing import PackedRow, Span
from fusiontree.errors import RunError, UserError

ROW, ROWS, SHARD_ROWS = 64, 100, 40  # groups of 32 and 8, shards of 40, 40 and 20 rows


def packed_rows(dtype: str = "uint16") -> list[PackedRow]:
    draw = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        tokens = draw.integers(2, 500, ROW).astype(dtype)
        length = 1 + number % 60
        ends = np.array([length, 62, -ROW], dtype=np.int32)
        spans = [Span(f"ä{number}", 0, length, 0), Span("long", length, 62 - length, 5 * number)]
        if number % 4 == 3:  # fewer segments than the neighbouring rows
            ends, spans = ends[1:], [Span(f"ä{number}", 0, 62, 0)]
        rows.append(PackedRow(tokens, ends, spans))
    return rows


def write(folder: Path, dtype: str = "uint16") -> Path:
    folder.mkdir()
    splits = {
        "train": write_split(folder, "train", packed_rows(dtype), "s", SHARD_ROWS),
        "validation": write_split(folder, "validation", packed_rows(dtype)[:3], "s", SHARD_ROWS),
    }
    Manifest(ROW, dtype, "s", TokenizerInfo("f" * 64, 500, 0, 1), splits).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_read_equal_rows_written(tmp_path: Path, dtype: str) -> None:
    dataset = Dataset(write(tmp_path / "set", dtype))
    assert dataset.num_rows == ROWS
    for number, row in enumerate(packed_rows(dtype)):
        tokens, ends = dataset.row(number)
        assert tokens.dtype == np.dtype(dtype)
        assert tokens.tolist() == row.tokens.tolist()
        assert ends.tolist() == row.ends.tolist()
        assert dataset.spans(number) == row.spans


def test_webdataset_reads_the_same_tokens(folder: Path) -> None:
    urls = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [len(sample["tok.npy"]) for sample in samples] == [32, 8, 32, 8, 20]
    assert len({sample["__key__"] for sample in samples}) == 5
    expected = packed_rows()
    assert np.concatenate([s["tok.npy"] for s in samples]).tolist() == [row.tokens.tolist() for row in expected]
    assert [e for s in samples for e in s["ends.npy"].tolist()] == [
        [*row.ends.tolist(), *[0] * (3 - len(row.ends))] for row in expected
    ]
    documents = [d for s in samples for row in s["json"]["documents"] for d in row]
    assert [d["id"] for d in documents if d["id"] != "long"] == [f"ä{i}" for i in range(ROWS)]


def test_same_rows_give_same_bytes(folder: Path, tmp_path: Path) -> None:
    os.umask(before := os.umask(0o077))
    again = write(tmp_path / "again")
    os.umask(before)
    for path in folder.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_manifest_totals(folder: Path) -> None:
    assert Manifest.load(folder).totals("train") == {
        "shards": 3,
        "bytes": sum(path.stat().st_size for path in (folder / "train").glob("*.tar")),
        "rows": ROWS,
        "tokens": 62 * ROWS,
        "documents": ROWS + 1,  # "long" begins once, in row 0
    }


def test_no_temporary_file_remains(folder: Path) -> None:
    assert sorted(path.suffix for path in (folder / "train").iterdir()) == [".idx"] * 3 + [".tar"] * 3


@pytest.mark.parametrize("field", ["tokens", "ends"])
def test_flipped_bit_is_detected_on_read(folder: Path, field: str) -> None:
    shard = Dataset(folder).shards[1]
    flip(shard.path, int(shard.index[field][33]) + 3)
    damaged = Dataset(folder)
    for number in range(ROWS):
        if number != SHARD_ROWS + 33:
            damaged.row(number)
    with pytest.raises(RunError, match=r"000001\.tar: row 33 is damaged"):
        damaged.row(SHARD_ROWS + 33)


def test_fingerprint_depends_on_every_shard(folder: Path) -> None:
    before = Dataset(folder).fingerprint
    assert Dataset(folder).fingerprint == before
    edit(folder, lambda values: values["splits"]["train"][2].update(sha256="0" * 64))
    assert Dataset(folder).fingerprint != before


def test_other_tokenizer_is_refused(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.require_tokenizer("f" * 64, "here")
    with pytest.raises(UserError, match="tokenizer here"):
        manifest.require_tokenizer("e" * 64, "here")


@pytest.mark.parametrize("number", [-1, ROWS])
def test_row_out_of_range_is_refused(folder: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"no row {number}"):
        Dataset(folder).row(number)


@pytest.mark.parametrize("name", ["manifest.json", "train/000001.tar", "train/000001.idx"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.rpartition("/")[2]) as caught:
        Dataset(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train/000001.tar", "train/000001.idx"])
def test_truncated_file_is_named(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 100)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        Dataset(folder)


def test_index_of_other_rows_is_refused(folder: Path) -> None:
    (folder / "train/000000.idx").write_bytes((folder / "train/000002.idx").read_bytes())
    with pytest.raises(UserError, match=r"000000\.idx is not the index that the manifest lists"):
        Dataset(folder)


def test_file_that_is_not_an_index_is_refused(folder: Path) -> None:
    with open(folder / "train/000000.idx", "wb") as stream:
        np.save(stream, np.zeros(SHARD_ROWS))
    with pytest.raises(UserError, match=r"000000\.idx is not a shard index"):
        Dataset(folder)


@pytest.mark.parametrize("name", ["../set/train/000000.tar", "/etc/passwd", "validation/000000.tar", "train/../x.tar"])
def test_shard_outside_its_split_is_refused(folder: Path, name: str) -> None:
    edit(folder, lambda values: values["splits"]["train"][0].update(name=name))
    with pytest.raises(UserError, match="is not the name of a shard in train/"):
        Dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format=2), "format 2"),
        (lambda values: values.update(dtype="int8"), "int8"),
        (lambda values: values.pop("row_len"), "row_len"),
        (lambda values: values["tokenizer"].update(vocab_size="many"), "vocab_size"),
        (lambda values: values.update(splits=[]), "manifest"),
    ],
)
def test_invalid_manifest_is_refused_in_one_line(folder: Path, change, message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        Dataset(folder)
    assert "\n" not in str(caught.value)


def test_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        Dataset(folder, "test")


@pytest.mark.parametrize(("vocab_size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_type_fits_every_id(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
