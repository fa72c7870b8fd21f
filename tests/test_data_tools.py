"""Tokenizer training, building, verification and inspection: complete, reproducible, and strict about mistakes."""

import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from data_tools import build as build_module
from data_tools.build import build_shards
from data_tools.inputs import find_files
from data_tools.inspection import describe, show_row
from data_tools.options import BuildOptions, InputOptions
from data_tools.readers import Rejected, extract_text, find_fault, read_records
from data_tools.tokenizers import load_tokenizer, train_tokenizer
from data_tools.verify import verify
from fusiontree import console as console_module
from fusiontree.data.format import Dataset, Manifest
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.shard_scan import scan_shard
from fusiontree.data.writer import write_index, write_tar
from fusiontree.errors import UserError

ROOT = Path(__file__).parent.parent
EXOTIC = "naïve — 東京 🌲\r\n\ttabs  and   spaces\0end <|endoftext|> <|pad|>\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 Python sources, one text with unusual characters, and two files that are not documents."""
    folder = tmp_path_factory.mktemp("inputs")
    sources = sorted((ROOT / "fusiontree").rglob("*.py"))[:10]
    for number in range(30):
        text = sources[number % len(sources)].read_text(encoding="utf-8")
        (folder / f"{number:02d}.txt").write_text(f"# {number}\n{text[: 200 * number + 1]}", encoding="utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "exotic.txt").write_bytes(EXOTIC.encode())
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "void.txt").touch()
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_tokenizer([inputs], 600, folder)
    return folder


@pytest.fixture(scope="module")
def built(inputs: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "set"
    build_shards([inputs], tokenizer, folder, BuildOptions(row_len=1024, holdout=0.1))
    return folder


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Path:
    """Copy the dataset for a test that damages it."""
    return shutil.copytree(built, tmp_path / "set")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_in(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of each document under a folder, and the reason for each rejected record."""
    texts, rejected = {}, {}
    for file in find_files([folder])[0]:
        for record in read_records(file, InputOptions(), find_fault(file, InputOptions())):
            try:
                texts[record.id] = extract_text(record, InputOptions())
            except Rejected as reason:
                rejected[record.id] = str(reason)
    return texts, rejected


def documents_in(folder: Path, split: str) -> dict[str, list[int]]:
    """Return the tokens of each document of a split, with its pieces joined."""
    dataset = Dataset(folder, split)
    pieces: dict[str, list[tuple[int, list[int]]]] = {}
    for number in range(dataset.num_rows):
        tokens, _ = dataset.row(number)
        for span in dataset.spans(number):
            piece = tokens[span.start : span.start + span.length].tolist()
            pieces.setdefault(span.id, []).append((span.offset, piece))
    return {name: [token for _, piece in sorted(found) for token in piece] for name, found in pieces.items()}


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_files_without_text_are_skipped_with_a_reason(inputs: Path) -> None:
    texts, rejected = texts_in(inputs)
    assert len(texts) == 31
    assert rejected == {"latin.txt": "not UTF-8 (line 1, byte 3)", "void.txt": "empty"}


def test_ids_are_sorted_relative_paths_without_hidden_entries(tmp_path: Path) -> None:
    hidden = [".git/x", "a/.hidden", "__pycache__/x", "lib/site-packages/x", "lib/dist-packages/x"]
    for name in ["b/z", "b/a", "B", "a.b/c", "a/c", *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files, skipped = find_files([tmp_path])
    assert [file.name for file in files] == ["B", "a.b/c", "a/c", "b/a", "b/z"]
    assert skipped == []


def test_patterns_match_name_or_path(tmp_path: Path) -> None:
    for name in ["a.py", "b.txt", "test/c.py", "lib/d.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, _ = find_files([tmp_path], InputOptions(include=["*.py"], exclude=["test/*"]))
    assert [file.name for file in files] == ["a.py", "lib/d.py"]


def test_links_cause_no_loops_and_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text").write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a" / "text")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    files, skipped = find_files([tmp_path, tmp_path / "a" / "text"])
    assert len(files) == 1
    assert [entry.path for entry in skipped] == ["broken"]


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("x")
    assert [entry.path for entry in find_files([tmp_path])[1]] == ["pipe"]


def test_files_with_a_shared_relative_name_are_named_by_path(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part").write_text("x")
        os.mkfifo(tmp_path / folder / "pipe")
    (tmp_path / "a" / "alone").write_text("x")
    a, b = (f"{tmp_path}/{folder}" for folder in ("a", "b"))
    files, skipped = find_files([a, b])
    assert [file.name for file in files] == ["alone", f"{a}/part", f"{b}/part"]
    assert [entry.path for entry in skipped] == [f"{a}/pipe", f"{b}/pipe"]


def test_a_name_that_equals_another_files_path_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x/a/part", "a/part", "b/part"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("x")
    assert [file.name for file in find_files(["x", "a", "b"])[0]] == ["x/a/part", "a/part", "b/part"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no documents"):
        find_files([tmp_path])
    with pytest.raises(UserError, match="matches nothing"):
        find_files([f"{tmp_path}/*.jsonl"])


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_training_is_reproducible(inputs: Path, tokenizer: Path, tmp_path: Path) -> None:
    figures = train_tokenizer([inputs], 600, tmp_path / "again")
    assert figures["output"] == str(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tokenizer)
    assert figures["vocab_size"] == 600
    assert figures["fingerprint"] == load_tokenizer(tokenizer)[1].fingerprint


def test_encoding_round_trips(tokenizer: Path) -> None:
    loaded, info = load_tokenizer(tokenizer)
    for text in (EXOTIC, bytes(range(128)).decode(), "\u0800\uffff\U0010ffff"):
        ids = loaded.encode(text).ids
        assert loaded.decode(ids, skip_special_tokens=False) == text
        assert info.eos_id not in ids  # a special token spelled out in a text is text
        assert info.pad_id not in ids


@pytest.mark.slow
def test_transformers_loads_the_tokenizer_and_gives_the_same_ids(tokenizer: Path) -> None:
    ours, info = load_tokenizer(tokenizer)
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (info.eos_id, info.pad_id, info.vocab_size)
    assert (info.eos_id, info.pad_id) == (0, 1)
    for path in [*sorted((ROOT / "fusiontree").rglob("*.py")), ROOT / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(theirs("naïve 東京 , x .")["input_ids"]) == "naïve 東京 , x ."


def test_the_fingerprint_ignores_json_formatting(tokenizer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    assert load_tokenizer(copy)[1] == load_tokenizer(tokenizer)[1]
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert load_tokenizer(copy)[1].fingerprint != load_tokenizer(tokenizer)[1].fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "[", "cannot be read"),
        ("tokenizer_config.json", "[" * 100_000, "it is nested too deeply"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "'<end>', which is not in the vocabulary; give --eos"),
    ],
)
def test_a_broken_tokenizer_is_refused(tokenizer: Path, tmp_path: Path, name: str, content, message: str) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_all_bytes_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer([inputs], 257, tmp_path / "tok")


# --- build -----------------------------------------------------------------------------------------------------------


def test_the_shards_contain_the_tokens_of_every_document(built: Path, inputs: Path, tokenizer: Path) -> None:
    loaded, info = load_tokenizer(tokenizer)
    found = documents_in(built, "train") | documents_in(built, "validation")
    assert found == {name: [*loaded.encode(text).ids, info.eos_id] for name, text in texts_in(inputs)[0].items()}
    assert any(len(tokens) > 1024 for tokens in found.values())  # at least one is cut across rows


def test_the_held_out_documents_are_spread_evenly(built: Path) -> None:
    assert sorted(documents_in(built, "validation")) == ["01.txt", "11.txt", "21.txt"]


@pytest.mark.parametrize(("holdout", "expected"), [(0.1, 4), (0.001, 1), (0.0, 0), (0.999, 30)])
def test_holdout_from_end_takes_the_last_files(tokenizer: Path, tmp_path: Path, holdout: float, expected: int) -> None:
    names = [f"{number:02d}.txt" for number in range(31)]
    for name in names:
        (tmp_path / name).write_text(f"text {name}")
    options = BuildOptions(row_len=64, holdout=holdout, holdout_from="end", input=InputOptions(include=["*.txt"]))
    build_shards([tmp_path], tokenizer, tmp_path / "set", options)
    assert sorted(documents_in(tmp_path / "set", "validation")) == names[len(names) - expected :]


@pytest.mark.parametrize(("parts", "holdout", "expected"), [(2, 0.25, ["b/1.jsonl:1"]), (1, 0.5, ["b/0.jsonl:1"])])
def test_holdout_from_end_distinguishes_files_with_a_shared_name(
    tokenizer: Path, tmp_path: Path, parts: int, holdout: float, expected: list[str]
) -> None:
    for name in (f"{folder}/{part}.jsonl" for folder in "ab" for part in range(parts)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\nbroken\n')
    output = tmp_path / "set"
    options = BuildOptions(row_len=64, holdout=holdout, holdout_from="end")
    figures = build_shards([tmp_path / "a", tmp_path / "b"], tokenizer, output, options)
    assert sorted(documents_in(output, "validation")) == [f"{tmp_path}/{name}" for name in expected]
    assert len(documents_in(output, "train")) == 2 * parts - 1
    assert [entry["path"] for entry in figures["skipped"]] == [
        f"{tmp_path}/{folder}/{part}.jsonl" for folder in "ab" for part in range(parts)
    ]


def test_holdout_from_end_refuses_a_single_file(inputs: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use --holdout-from spread"):
        build_shards([inputs / "01.txt"], tokenizer, tmp_path / "set", BuildOptions(row_len=1024, holdout_from="end"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("count", "holdout", "expected"), [(2, 0.001, 1), (1, 0.5, 0), (4, 0.0, 0), (3, 0.99, 2)])
def test_the_holdout_is_at_least_one_document_and_never_all(
    tokenizer: Path, tmp_path: Path, count: int, holdout: float, expected: int
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text("text")
    options = BuildOptions(row_len=64, holdout=holdout, input=InputOptions(include=["*.txt"]))
    build_shards([tmp_path], tokenizer, tmp_path / "set", options)
    assert describe(tmp_path / "set")["splits"]["validation"]["documents"] == expected


def test_the_figures_match_the_shards(inputs: Path, tokenizer: Path, tmp_path: Path) -> None:
    figures = build_shards([inputs], tokenizer, tmp_path / "set", BuildOptions(row_len=1024))
    found = documents_in(tmp_path / "set", "train") | documents_in(tmp_path / "set", "validation")
    lengths = [len(tokens) for tokens in found.values()]
    rows = sum(Dataset(tmp_path / "set", split).num_rows for split in ("train", "validation"))
    assert figures["documents"] == 31
    assert figures["tokens"] == sum(lengths)
    assert figures["cut_documents"] == sum(length > 1024 for length in lengths)
    assert figures["rows"] == rows
    assert figures["padding"] == pytest.approx(1 - sum(lengths) / (rows * 1024))
    assert [entry["path"] for entry in figures["skipped"]] == ["latin.txt", "void.txt"]
    assert describe(tmp_path / "set")["skipped"] == figures["skipped"]


def test_the_progress_bar_shows_bytes_tokens_and_time_left(
    inputs: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(console_module, "console", Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(build_module, "_CHUNK_RECORDS", 1)  # at least two measurements of the speed
    build_shards([inputs], tokenizer, tmp_path / "set", BuildOptions(row_len=512))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).strip().splitlines()[-1]
    size = r"[\d.]+ ?(bytes|[kMG]B)"
    columns = rf"build +━+ +[\d.]+/{size} +[\d.]+ ?(bytes|[kMG]B)/s +\d+:\d\d:\d\d +\d+:\d\d:\d\d +[\d.]+ Mtok/s"
    assert re.fullmatch(columns, shown.rstrip()), shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"holdout": 1.0}, "--holdout is 1.0"),
        ({"holdout": -0.1}, "--holdout is -0.1"),
        ({"workers": 0}, "--workers is 0"),
        ({"row_len": 5000}, "row length 5000"),
    ],
)
def test_invalid_options_are_refused_before_any_work(
    inputs: Path, tokenizer: Path, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_shards([inputs], tokenizer, tmp_path / "set", BuildOptions(**arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_replaced_only_with_overwrite(inputs: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    with pytest.raises(UserError, match="has other contents"):
        build_shards([inputs], tokenizer, tmp_path / "set", BuildOptions(overwrite=True))
    (tmp_path / "set" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="pass --overwrite"):
        build_shards([inputs], tokenizer, tmp_path / "set")
    assert (tmp_path / "set" / "mine").exists()
    build_shards([inputs], tokenizer, tmp_path / "set", BuildOptions(overwrite=True))
    assert verify(tmp_path / "set")["problems"] == []
    assert not (tmp_path / "set" / "mine").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_process_and_no_output(tokenizer: Path, tmp_path: Path, how: int) -> None:
    (tmp_path / "in").mkdir()
    for number in range(400):
        (tmp_path / "in" / f"{number}.txt").write_text("some words to encode " * 5000)
    script = f"""
import signal
from pathlib import Path
from data_tools.build import build_shards
from data_tools.options import BuildOptions
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell makes its children ignore it
    here = Path({str(tmp_path)!r})
    build_shards([here / "in"], Path({str(tokenizer)!r}), here / "set", BuildOptions(workers=2))
"""
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )

    def group() -> int:
        """Return the number of running processes in the build's session."""
        count = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            count += int(fields[3]) == process.pid and fields[0] != "Z"
        return count

    def wait_until(condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_until(lambda: group() >= 3 and any(tmp_path.glob(".set.partial/train")))
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    process.wait(30)
    wait_until(lambda: group() == 0)
    assert process.returncode != 0
    assert not (tmp_path / "set").exists()
    assert how == signal.SIGKILL or not list(tmp_path.glob(".set*"))


# --- verify and inspect ----------------------------------------------------------------------------------------------


def test_an_intact_dataset_has_no_problems(built: Path) -> None:
    figures = verify(built)
    assert figures["problems"] == []
    assert figures["rows"] == sum(Dataset(built, split).num_rows for split in ("train", "validation"))


def test_a_flipped_bit_in_a_row_is_named(damaged: Path) -> None:
    shard = Dataset(damaged).shards[0]
    content = bytearray(shard.path.read_bytes())
    content[int(shard.index["tokens"][2]) + 9] ^= 64
    shard.path.write_bytes(content)
    assert verify(damaged)["problems"] == [
        "train/000000.tar: row 2: checksum differs",
        "train/000000.tar: SHA-256 differs from the manifest: the shard was changed after it was written",
    ]


def test_a_flipped_bit_outside_the_rows_is_found(damaged: Path) -> None:
    path = damaged / "train" / "000000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end_mark = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify(damaged)["problems"] == [
        f"train/000000.tar: tar header at byte {end_mark} is damaged",
        "train/000000.tar: SHA-256 differs from the manifest: the shard was changed after it was written",
    ]


@pytest.mark.parametrize("field", ["tokens", "ends", "segments", "valid", "crc"])
def test_a_wrong_index_entry_is_named(damaged: Path, field: str) -> None:
    path = damaged / "train" / "000000.idx"
    index = np.load(path).copy()
    index[field][1] += 1
    with open(path, "wb") as stream:
        np.save(stream, index)
    assert any("000000.tar: row 1: index entry differs" in problem for problem in verify(damaged)["problems"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"vocab_size": 600', '"vocab_size": 300', "is not below the vocabulary size 300"),
        ('"documents": ', '"documents": 1', "documents, but 1"),
        (
            '"totals": {\n  "train": {\n   "shards": 1',
            '"totals": {\n  "train": {\n   "shards": 2',
            "the totals are not",
        ),
        ('"fingerprint": "', '"fingerprint": "0', "is not the one that made the shards"),
        ('"format": 1', '"format": [', "is not a dataset's manifest"),
    ],
)
def test_a_manifest_that_contradicts_the_dataset_is_found(damaged: Path, old: str, new: str, message: str) -> None:
    path = damaged / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert any(message in problem for problem in verify(damaged)["problems"])


@pytest.mark.parametrize("ends", [[9, 5, 1024], [9, 1000]])
def test_segments_that_do_not_cover_their_row_are_named(damaged: Path, ends: list[int]) -> None:
    manifest = Manifest.load(damaged)
    shutil.rmtree(damaged / "train")
    row = PackedRow(np.ones(1024, np.uint16), np.array(ends, np.int32), [Span("a", 0, 9, 0)])
    path = damaged / "train" / "000000.tar"
    path.parent.mkdir()
    with open(path, "wb") as stream:
        write_tar(stream, [row], 0, {"source": "s", "tokenizer": ""})
    scan = scan_shard(path)
    write_index(path, scan.index)
    dataclasses.replace(manifest, splits=manifest.splits | {"train": [scan.info("train/000000.tar")]}).save(damaged)
    assert verify(damaged)["problems"] == [
        "train/000000.tar: row 0: segment ends do not ascend to the row's length 1024"
    ]


def test_missing_and_unknown_files_are_named(damaged: Path) -> None:
    (damaged / "train" / "000000.tar").rename(damaged / "train" / "000007.tar")
    problems = verify(damaged)["problems"]
    assert "train/000000.tar: missing" in problems
    assert "train/000007.tar: not in the manifest" in problems


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        verify(tmp_path)


def test_show_row_lists_the_documents(built: Path, inputs: Path) -> None:
    shown = show_row(built, 0, split="validation")
    dataset = Dataset(built, "validation")
    assert shown["valid_tokens"] == dataset.valid_tokens[0]
    for document in shown["documents"]:
        if document["offset"] == 0:
            text = (inputs / document["id"]).read_bytes().decode()
            assert len(document["text"]) > 20
            assert text.startswith(document["text"].removesuffix("<|endoftext|>"))


def test_show_row_refuses_another_tokenizer(built: Path, inputs: Path, tmp_path: Path) -> None:
    train_tokenizer([inputs], 300, tmp_path / "other")
    with pytest.raises(UserError, match="is not the one that made the shards"):
        show_row(built, 0, tokenizer=tmp_path / "other")
