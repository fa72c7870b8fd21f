"""Damage to a dataset is reported by shard and row; lost indexes and manifests are rebuilt only from sound shards."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import in_process, write_split

from data_tools.reindex import reindex
from data_tools.tokenizers import load_tokenizer, train_tokenizer
from data_tools.verify import verify
from fusiontree.data.format import Dataset, Manifest, read_index
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.shard_scan import scan_shard
from fusiontree.data.tokenizer import open_tokenizer
from fusiontree.errors import RunError, UserError

ROW, ROWS, SHARD_ROWS = 64, 200, 96  # shards of 96, 96 and 8 rows; samples of 32, so three in the first
CHANGED = "SHA-256 differs from the manifest: the shard was changed after it was written"


@pytest.fixture(scope="module")
def intact(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "set"
    folder.mkdir()
    draw = np.random.default_rng(0)
    _, info = load_tokenizer(tokenizer_folder)
    rows = [
        PackedRow(
            draw.integers(2, 290, ROW).astype(np.uint16),
            np.array([20, 60, -ROW], np.int32),
            [Span(f"a{i}", 0, 20, 0), Span(f"b{i}", 20, 40, 0)],
        )
        for i in range(ROWS)
    ]
    splits = {"train": write_split(folder, "train", rows, "s", SHARD_ROWS), "validation": []}
    Manifest(ROW, "uint16", "s", info, splits).save(folder)
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "set")


@pytest.fixture
def bare(folder: Path) -> Path:
    """Return a dataset folder without indexes and manifest."""
    (folder / "manifest.json").unlink()
    for path in folder.glob("*/*.idx"):
        path.unlink()
    return folder


def change(path: Path, at: int, new: Callable[[bytes], bytes], size: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + size] = new(bytes(content[at : at + size]))
    path.write_bytes(content)


def flip_token(folder: Path) -> None:
    path = folder / "train/000001.tar"
    change(path, int(read_index(path)["tokens"][33]) + 4, lambda old: bytes([old[0] ^ 1]))


def flip_end(folder: Path) -> None:
    path = folder / "train/000001.tar"
    change(path, int(read_index(path)["ends"][33]), lambda old: bytes([old[0] ^ 1]))


def header_of_second_sample(folder: Path) -> int:
    """Return the byte offset, in the first shard, of the header of the second sample's first member."""
    content = (folder / "train/000000.tar").read_bytes()
    return content.index(b"000000032.ends.npy")


def zero_header(folder: Path) -> None:
    change(folder / "train/000000.tar", header_of_second_sample(folder), lambda old: bytes(len(old)), 512)


def garble_header(folder: Path) -> None:
    change(folder / "train/000000.tar", header_of_second_sample(folder) + 130, lambda old: b"7", 1)


def truncate(folder: Path) -> None:
    os.truncate(folder / "train/000000.tar", header_of_second_sample(folder) + 2000)


def replace_shard(folder: Path) -> None:
    """Replace a shard and its index by another valid pair, which only the manifest can detect."""
    other = folder.parent / "other"
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    row = PackedRow(np.full(ROW, 7, np.uint16), np.array([ROW], np.int32), [Span("x", 0, ROW, 0)])
    write_split(other, "train", [row] * SHARD_ROWS, "s", SHARD_ROWS)
    for ending in ("tar", "idx"):
        shutil.copy(other / f"train/000000.{ending}", folder / f"train/000001.{ending}")


def wrong_index(folder: Path) -> None:
    path = folder / "train/000001.idx"
    index = np.load(path)
    index["tokens"][[3, 4]] = index["tokens"][[4, 3]]
    np.save(path.open("wb"), index)


def empty_index(folder: Path) -> None:
    index = read_index(folder / "train/000001.tar")
    np.save((folder / "train/000001.idx").open("wb"), index[:0])


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a flipped token": (flip_token, ["train/000001.tar: row 33: checksum differs", f"train/000001.tar: {CHANGED}"]),
    "a flipped end": (flip_end, ["train/000001.tar: row 33: checksum differs", f"train/000001.tar: {CHANGED}"]),
    "a zeroed header": (
        zero_header,
        [
            "000000.tar: tar header at byte ",
            "000000.tar: the sample that begins at row 32 cannot be read (ends.npy missing)",
            CHANGED,
        ],
    ),
    "a garbled header": (
        garble_header,
        [
            "000000.tar: tar header at byte ",
            "000000.tar: the sample that begins at row 32 cannot be read (ends.npy missing)",
            CHANGED,
        ],
    ),
    "a truncated shard": (
        truncate,
        [
            "000000.tar: member '000000032.json' is cut short",
            "000000.tar: the sample that begins at row 32 cannot be read (json and tok.npy missing)",
            "000000.tar: has ",
            CHANGED,
        ],
    ),
    "a missing shard": (lambda f: (f / "train/000002.tar").unlink(), ["train/000002.tar: missing"]),
    "a replaced shard": (replace_shard, [f"train/000001.tar: {CHANGED}"]),
    "a wrong index": (
        wrong_index,
        [f"train/000001.tar: row {row}: index entry differs from the shard" for row in (3, 4)],
    ),
    "a missing index": (lambda f: (f / "train/000001.idx").unlink(), ["000001.idx is missing"]),
    "an index without entries": (empty_index, ["train/000001.tar: the index lists 0 rows, but the manifest 96"]),
    "an index of other rows": (
        lambda f: shutil.copy(f / "train/000002.idx", f / "train/000001.idx"),
        ["train/000001.tar: the index lists 8 rows, but the manifest 96"],
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_verify_reports_damage_by_shard_and_row(folder: Path, kind: str) -> None:
    assert verify(folder)["problems"] == []
    damage, expected = DAMAGE[kind]
    damage(folder)
    for workers in (1, 2) if kind == "a flipped token" else (1,):
        problems = verify(folder, workers)["problems"]
        for part in expected:
            assert any(part in problem for problem in problems), (part, problems)
        assert len({problem.partition(":")[0] for problem in problems}) == 1  # no other file is reported


def test_verify_prints_one_line_per_problem_and_exits_with_1(folder: Path) -> None:
    flip_token(folder)
    assert "train/000001.tar: row 33: checksum differs" in in_process("data", "verify", folder, code=1).stdout


@pytest.mark.parametrize("damage", [zero_header, garble_header])
def test_documents_of_damaged_sample_are_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    dataset = Dataset(folder)
    for row in (32, 63):
        with pytest.raises(RunError, match=rf"000000\.tar: the sample of row {row} is damaged \(") as caught:
            dataset.spans(row)
        assert "\n" not in str(caught.value)
    assert [dataset.spans(row)[0].id for row in (31, 64)] == ["a31", "a64"]


def test_documents_of_another_row_are_never_returned(folder: Path) -> None:
    path = folder / "train/000000.tar"
    content = path.read_bytes()
    crcs = [str(crc).encode() for crc in read_index(path)["crc"][:2]]
    path.write_bytes(content.replace(crcs[0], b"9" * len(crcs[0])))
    with pytest.raises(RunError, match="the sample of row 0 is damaged"):
        Dataset(folder).spans(0)
    assert Dataset(folder).spans(1)[0].id == "a1"


@pytest.mark.parametrize("name", ["eos_id", "pad_id", "vocab_size"])
def test_verify_reports_manifest_that_contradicts_the_tokenizer(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    right = values["tokenizer"][name]
    values["tokenizer"][name] += 1
    path.write_text(json.dumps(values))
    expected = f"manifest.json: {name} is {right + 1}, but {right} in {folder / 'tokenizer'}"
    assert verify(folder)["problems"] == [expected]


def test_verify_reports_golden_text_that_is_not_valid_unicode(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\\ud835\\udfd8", b"\\ud035\\udfd8"))
    (problem,) = verify(folder)["problems"]
    assert problem == f"{path}: it has a text that is not valid Unicode; rebuild the dataset"


def flips(content: bytes, begin: int, end: int) -> Iterator[bytes]:
    """Yield the content with one bit flipped, for each bit of bytes `begin` to `end`."""
    for bit in range(8 * begin, 8 * end):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.slow
def test_flipped_bit_in_index_header_is_detected(folder: Path) -> None:
    path = folder / "train/000002.idx"
    content, intact = path.read_bytes(), read_index(path)
    refusals = []
    for flipped in flips(content, 0, len(content) - intact.nbytes):
        path.write_bytes(flipped)
        try:
            assert (read_index(path) == intact).all()  # the bit was in the header's padding
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 1000
    assert all("000002.idx is not a shard index" in line and "\n" not in line for line in refusals)
    path.write_bytes(content[:8] + bytes([content[8] ^ 64]) + content[9:])
    assert "000002.idx is not a shard index (its .npy header is damaged" in verify(folder)["problems"][0]


@pytest.mark.slow
@pytest.mark.parametrize("member", ["ends.npy", "tok.npy"])
def test_flipped_bit_in_array_header_is_detected(folder: Path, member: str) -> None:
    path = folder / "train/000002.tar"
    content = path.read_bytes()
    begin = content.index(f"000000192.{member}".encode()) + 512
    intact = scan_shard(path).info("")
    faults = 0
    for flipped in flips(content, begin, begin + 128):
        path.write_bytes(flipped)
        scan = scan_shard(path)
        assert scan.sha256 != intact.sha256
        faults += bool(scan.faults)
    assert faults > 700


# --- reindex ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_lost_indexes_and_manifest_are_rebuilt_bit_for_bit(bare: Path, intact: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bare.glob("*/*.tar")}
    figures = json.loads(in_process("data", "reindex", bare, "--workers", 2, "--json").stdout)
    assert figures == {
        "shards": 3,
        "rows": ROWS,
        "tokens": 60 * ROWS,
        "adopted": True,
        "problems": [],
        "bytes": sum(path.stat().st_size for path in bare.glob("*/*.tar")),
    }
    assert contents(bare) == contents(intact)
    assert {path: path.stat().st_mtime_ns for path in bare.glob("*/*.tar")} == before
    assert Dataset(bare).fingerprint == Dataset(intact).fingerprint


def test_tokenizer_may_come_from_another_folder(bare: Path, intact: Path, tokenizer_folder: Path) -> None:
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(UserError, match="contains no tokenizer; pass the tokenizer of the shards as --tokenizer"):
        reindex(bare)
    assert reindex(bare, tokenizer_folder)["adopted"]
    assert contents(bare).keys() == contents(intact).keys()
    assert verify(bare)["problems"] == []
    assert open_tokenizer(bare / "tokenizer").get_vocab_size() == 300


@pytest.mark.parametrize("kind", ["a flipped token", "a flipped end", "a zeroed header", "a truncated shard"])
def test_damaged_shards_are_never_adopted(folder: Path, kind: str) -> None:
    DAMAGE[kind][0](folder)
    (folder / "manifest.json").unlink()
    for path in folder.glob("*/*.idx"):
        path.unlink()
    refused = reindex(folder)
    assert not refused["adopted"]
    assert refused["problems"]
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob("*/*.idx")) == []
    adopted = reindex(folder, skip_damaged=True)
    assert adopted["problems"][0] == refused["problems"][0]
    assert len(Manifest.load(folder).splits["train"]) == 2
    dataset = Dataset(folder)
    for row in range(dataset.num_rows):
        dataset.row(row)


def test_remaining_index_is_checked_against_its_shard(folder: Path) -> None:
    replace_shard(folder)
    shutil.copy(folder / "train/000001.tar", folder / "train/000000.tar")  # sound, but not the shard of its index
    (folder / "manifest.json").unlink()
    assert any("000000.tar: row 0: differs from the index" in problem for problem in reindex(folder)["problems"])


def test_lost_shard_is_reported_by_its_rows(bare: Path) -> None:
    (bare / "train/000001.tar").unlink()
    assert reindex(bare)["problems"] == ["train: rows 96 to 191 are missing before train/000002.tar"]
    assert reindex(bare, skip_damaged=True)["adopted"]


def test_tokenizer_with_smaller_vocabulary_is_refused(bare: Path, corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], 270, tmp_path / "other")
    problems = reindex(bare, tmp_path / "other")["problems"]
    assert any("is not below the vocabulary size 270" in problem for problem in problems)


@pytest.mark.parametrize("lost", [["000001"], ["000000", "000001", "000002"]])
def test_lost_indexes_are_rebuilt_under_a_manifest(folder: Path, intact: Path, lost: list[str]) -> None:
    for name in lost:
        (folder / f"train/{name}.idx").unlink()
    before = (folder / "manifest.json").stat().st_mtime_ns
    figures = json.loads(in_process("data", "reindex", folder, "--json").stdout)
    assert (figures["shards"], figures["adopted"], figures["problems"]) == (len(lost), True, [])
    assert contents(folder) == contents(intact)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["a damaged index", "an index of other rows"])
def test_indexes_that_differ_from_the_manifest_are_rebuilt(folder: Path, intact: Path, kind: str) -> None:
    if kind == "a damaged index":
        change(folder / "train/000001.idx", 0, bytes, 64)
    shutil.copy(folder / "train/000002.idx", folder / "train/000000.idx")
    assert reindex(folder)["adopted"]
    assert contents(folder) == contents(intact)


def test_under_a_manifest_only_its_shards_get_an_index(folder: Path) -> None:
    replace_shard(folder)  # sound, but not the manifest's
    (folder / "train/000000.tar").unlink()
    for path in folder.glob("*/*.idx"):
        path.unlink()
    refused = reindex(folder)
    assert refused["problems"][0] == "train/000000.tar: missing"
    assert refused["problems"][-1] == f"train/000001.tar: {CHANGED}"
    assert not refused["adopted"]
    assert list(folder.glob("*/*.idx")) == []
    assert reindex(folder, skip_damaged=True)["adopted"]
    assert [path.name for path in folder.glob("*/*.idx")] == ["000002.idx"]


def test_rebuilt_manifest_gets_the_token_named_by_eos(bare: Path) -> None:
    assert reindex(bare, eos="<|pad|>")["adopted"]
    assert Manifest.load(bare).tokenizer.eos_id == 1
    assert verify(bare)["problems"] == []


def test_lost_index_is_named_with_the_command_that_rebuilds_it(folder: Path) -> None:
    (folder / "train/000001.idx").unlink()
    command = f"`fusiontree data reindex {folder}`"
    with pytest.raises(UserError, match="000001.idx is missing") as caught:
        Dataset(folder)
    assert command in str(caught.value)
    assert command in verify(folder)["problems"][0]


def test_complete_dataset_is_not_reindexed(folder: Path) -> None:
    with pytest.raises(UserError, match="has its manifest and every index; check it with"):
        reindex(folder)
    with pytest.raises(UserError, match="give a dataset folder"):
        reindex(folder / "tokenizer")
    (folder / "train/000001.idx").unlink()
    with pytest.raises(UserError, match="omit --tokenizer and --eos"):
        reindex(folder, folder / "tokenizer")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="or remove the manifest and run `fusiontree data reindex` again"):
        reindex(folder)


@pytest.mark.parametrize("size", [-512, -513, -1024, -(2**40), -(2**62)])
def test_a_negative_size_in_a_header_does_not_stop_the_scan(folder: Path, size: int) -> None:
    path, at = folder / "train/000000.tar", header_of_second_sample(folder)
    content = path.read_bytes()
    header = tarfile.TarInfo.frombuf(content[at : at + 512], "utf-8", "strict")
    header.size = size
    path.write_bytes(content[:at] + header.tobuf(tarfile.GNU_FORMAT) + content[at + 512 :])
    scan = scan_shard(path)
    assert f"tar header at byte {at} is damaged" in scan.faults
    assert scan.row_numbers == [*range(32), *range(64, 96)]
