"""Readers of every input format; damaged input is reported, never used in part, and never stops a build."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from conftest import cli, metrics, settings

from data_tools.build import build_shards
from data_tools.inputs import find_files
from data_tools.options import BuildOptions, InputOptions
from data_tools.readers import Rejected, extract_text, find_fault, read_records
from fusiontree.data.format import Dataset, Manifest
from fusiontree.errors import RunError, UserError

TEXTS = ["tree gate\r\n", "naïve 東京 🌲", "branch " * 400]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_kind(path: Path) -> None:
    """Write TEXTS in the format that the file name implies."""
    numbered = {f"a/{i}.txt": text.encode() for i, text in enumerate(TEXTS)}
    plain = "<end>".join(TEXTS).encode()
    match path.name.partition(".")[2]:
        case "jsonl" | "ndjson":
            path.write_bytes(LINES)
        case "jsonl.gz" | "json.gz":
            path.write_bytes(gzip.compress(LINES))
        case "jsonl.xz":
            path.write_bytes(lzma.compress(LINES[:90]) + lzma.compress(LINES[90:]))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(LINES[:90]) + bz2.compress(LINES[90:]))
        case "jsonl.zst":
            options = {zstd.CompressionParameter.checksum_flag: 1}  # the default of the zstd command
            path.write_bytes(b"".join(zstd.compress(part, options=options) for part in (LINES[:90], LINES[90:])))
        case "parquet":
            table = pyarrow.table({"n": [0, 1, 2], "text": TEXTS})
            pyarrow.parquet.write_table(table, path, row_group_size=2, write_page_checksum=True)
        case "tar":
            pictures = {f"a/{i}.jpg": b"\xff" * 600 for i in range(3)}
            write_tar(path, dict(sorted((numbered | pictures).items())))
        case "tar.gz" | "tgz" | "tar.xz" | "tar.bz2":
            lines = [json.dumps({"text": text}).encode() for text in TEXTS]
            mode = f"w:{path.suffix[1:].replace('tgz', 'gz')}"
            write_tar(path, {f"{i}.json": line for i, line in enumerate(lines)}, mode)
        case "txt":
            path.write_bytes(plain)
        case "txt.gz":
            path.write_bytes(gzip.compress(plain))
        case "txt.xz":
            path.write_bytes(lzma.compress(plain))


KINDS = ["jsonl", "ndjson", "jsonl.gz", "json.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "parquet"]
KINDS += ["tar", "tar.gz", "tgz", "tar.xz", "tar.bz2", "txt", "txt.gz", "txt.xz"]


def read(path: Path, options: InputOptions | None = None) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Return the documents by id, and (file, place, reason) of each rejected record."""
    options = options or InputOptions(separator="<end>")
    texts, rejected = {}, []
    for file in find_files([path])[0]:
        for record in read_records(file, options, find_fault(file, options)):
            try:
                texts[record.id] = extract_text(record, options)
            except Rejected as reason:
                rejected.append((record.file, record.place, str(reason)))
    return texts, rejected


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_documents_in_order(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / f"in.{kind}")
    texts, rejected = read(tmp_path)
    assert list(texts.values()) == TEXTS
    assert rejected == []
    assert len({name.removeprefix(f"in.{kind}") for name in texts} - {""}) == len(TEXTS)


def test_uncompressed_json_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": 1}')
    assert read(tmp_path, InputOptions())[0] == {"package.json": '{"name": 1}'}


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + LINES + codecs.BOM_UTF8 + LINES)  # two concatenated files
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8 + b"one<end>two")
    (tmp_path / "c.md").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "\ufeffkept, as an escape"}))
    texts, rejected = read(tmp_path)
    assert [*texts.values()] == [*TEXTS, *TEXTS, "one", "two", "\ufeffkept, as an escape"]
    assert rejected == [("c.md", "document 1, line 1", "empty")]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_a_dictionary_encoded_column_is_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([*TEXTS, None, TEXTS[0]], kind).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    texts, rejected = read(tmp_path)
    assert [*texts.values()] == [*TEXTS, TEXTS[0]]
    assert rejected == [("in.parquet", "row 3", "null")]


def test_patterns_and_folders_keep_the_given_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "a/x/3.txt", "a/4.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    files, _ = find_files([f"{tmp_path}/b/*.jsonl", tmp_path / "a", f"{tmp_path}/**/*.txt"])
    assert [file.name for file in files] == ["1.jsonl", "2.jsonl", "4.md", "x/3.txt"]


def test_long_documents_are_split_at_the_separator(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "", "  \n", "y" * 10]
    (tmp_path / "in.txt").write_text("--\n".join(texts))
    found, _ = read(tmp_path, InputOptions(separator="--\n"))
    assert found == {"in.txt:1": texts[0], "in.txt:4": texts[3]}


BAD_LINES = [
    (b'{"text": "x"', "not valid JSON"),
    (b'["x"]', "not a JSON object"),
    (b'{"content": "x", "id": 1}', "no key 'text' (keys: content, id)"),
    (b'{"text": 7}', "'text' is not a string"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "unpaired surrogate"),
    (b'{"text": ""}', "empty"),
    (b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_only_the_bad_line_is_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES + b"\n" + line + b"\n" + LINES)
    texts, rejected = read(tmp_path)
    assert list(texts.values()) == TEXTS * 2
    assert rejected == [("in.jsonl", "line 5", reason)]


@pytest.mark.parametrize(
    "kind", ["jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "parquet", "tar", "tar.gz", "tar.xz", "txt.gz"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_container_is_skipped_entirely(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / f"in.{kind}"
    write_kind(path)
    content = bytearray(path.read_bytes())
    if kind == "tar":  # between two members, or a zeroed header: `tarfile` takes both for the end
        content = content[:5120] if damage == "cut" else content[:1536] + bytes(512) + content[2048:]
    elif damage == "cut":
        del content[len(content) * 2 // 3 :]
    else:
        at = content.find(b"gate")  # the text itself, unless it is compressed
        content[at if at > 0 else len(content) // 2] ^= 0x55
    path.write_bytes(content)
    texts, rejected = read(tmp_path)
    assert texts == {}
    [(name, place, reason)] = rejected
    assert (name, place) == (f"in.{kind}", "")
    assert reason.startswith("unreadable ")


def test_columns_and_members_without_text_are_reported(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    write_tar(tmp_path / "d.tar", {"1.jpg": b"x", "2.txt": b"y", "2.json": b"{}", "3.json": b"{}"})
    texts, rejected = read(tmp_path)
    assert texts == {"c.parquet:0": "x", "d.tar/2": "y"}
    assert rejected == [
        ("a.parquet", "", "unreadable parquet: no column 'text' (columns: body)"),
        ("b.parquet", "", "unreadable parquet: column 'text' has type int64, not string"),
        ("c.parquet", "row 1", "null"),
        ("d.tar", "sample 1", "neither .txt nor .json"),
        ("d.tar", "member 3.json", "no key 'text' (keys: )"),
    ]
    assert list(read(tmp_path / "a.parquet", InputOptions(text_key="body"))[0].values()) == TEXTS


def test_parquet_without_pyarrow_is_a_user_error(tmp_path: Path, tokenizer_folder: Path, monkeypatch) -> None:
    write_kind(tmp_path / "in.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"in\.parquet needs pyarrow; run pip install 'fusiontree\[parquet\]'"):
        build_shards([tmp_path], tokenizer_folder, tmp_path / "out")


def test_a_file_that_changes_during_the_build_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    write_kind(path)
    [file] = find_files([path])[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match="changed while it was being read"):
        list(read_records(file, InputOptions(), ""))


def test_documents_outside_the_length_limits_are_counted_not_listed(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES)
    options = BuildOptions(row_len=512, input=InputOptions(min_chars=11, max_chars=999))
    figures = build_shards([tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "set", options)
    assert (figures["documents"], figures["too_short"], figures["too_long"]) == (1, 1, 1)
    assert figures["skipped"] == []


@pytest.mark.parametrize("lengths", [{"min_chars": -1}, {"min_chars": 5, "max_chars": 4}, {"max_chars": 0}])
def test_length_limits_that_exclude_everything_are_refused(lengths: dict) -> None:
    with pytest.raises(UserError, match="--min-chars"):
        InputOptions(**lengths)


@pytest.mark.slow
def test_all_formats_and_two_broken_files_from_build_to_training(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for kind in KINDS:
        write_kind(folder / f"{kind.replace('.', '-')}.{kind}")
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(os.urandom(9) + LINES)[:-9])
    (folder / "broken.jsonl").write_bytes(LINES + b'{"text": \n' * 12)
    done = cli(
        *("data", "build", "--input", folder, "--tokenizer", tokenizer_folder, "--output", tmp_path / "set"),
        *("--row-len", 512, "--doc-separator", "<end>"),
    )
    assert f"output         {tmp_path / 'set'}\n" in done.stdout
    assert f"documents      {3 * len(KINDS) + 3}" in done.stdout
    assert "broken.jsonl (line 4, line 5, " in done.stdout
    assert "line 13 and 2 more): not valid JSON" in done.stdout
    assert "broken.jsonl.gz: unreadable gz: " in done.stdout
    skipped = Manifest.load(tmp_path / "set").skipped
    assert [entry["path"] for entry in skipped] == ["broken.jsonl", "broken.jsonl.gz"]
    assert skipped[0] == {
        "path": "broken.jsonl",
        "reason": "not valid JSON",
        "count": 12,
        "places": [f"line {number}" for number in range(4, 14)],
    }
    datasets = [Dataset(tmp_path / "set", split) for split in ("train", "validation")]
    names = {span.id for dataset in datasets for row in range(dataset.num_rows) for span in dataset.spans(row)}
    assert len(names) == 3 * len(KINDS) + 3
    assert {name for name in names if name.startswith("broken")} == {f"broken.jsonl:{line}" for line in (1, 2, 3)}
    run = {"name": "run", "schedule__steps": 3, "validation__every": 3, "checkpoint__every": 3}
    cli("train", "tiny", *settings(tmp_path / "set", tmp_path, **run))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if 0 < line.get("loss", 0) < 10] == [1, 2, 3]
    assert [line["step"] for line in lines if 0 < line.get("val_loss", 0) < 10] == [0, 3]
    assert json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())["bad_rows"] == []


def test_the_pieces_of_a_long_document_are_marked_as_continuing(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(chr(33 + i % 90) for i in range(3000)))
    build_shards([tmp_path / "in.txt"], tokenizer_folder, tmp_path / "set", BuildOptions(row_len=512, holdout=0))
    with tarfile.open(tmp_path / "set" / "train" / "000000.tar") as tar:
        content = tar.extractfile("000000000.json")
        assert content is not None
        rows = json.load(content)["documents"]
    pieces = sorted((span for row in rows for span in row), key=lambda span: span["offset"])
    assert len(pieces) > 3
    assert [span.get("continues", False) for span in pieces] == [True] * (len(pieces) - 1) + [False]
    assert [span["offset"] > 0 for span in pieces] == [False] + [True] * (len(pieces) - 1)
    spans = [span for row in range(len(rows)) for span in Dataset(tmp_path / "set").spans(row)]
    assert sum(span.continues for span in spans) == len(pieces) - 1
