"""Mutated datasets give one line or masked rows, and every row that is read is one that was written."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_split
from fuzz import attempt, mutate_bytes, mutate_json, run_cases

from data_tools.inspection import describe, show_row
from data_tools.reindex import reindex
from data_tools.tokenizers import load_tokenizer
from data_tools.verify import verify
from fusiontree.data import segments
from fusiontree.data import sources as sources_module
from fusiontree.data.format import INDEX, Dataset, Manifest, ShardInfo, index_digest, read_index, row_crc
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.preview import documents_at, preview_run
from fusiontree.data.sources import Ledger, Sources, held_out_sources
from fusiontree.data.stream import TrainStream, single_source_recipe, validation_batches
from fusiontree.data.writer import write_index
from fusiontree.evaluate.ngram import Bigram
from fusiontree.files import parse_json

ROW, ROWS, SHARD_ROWS, MODEL_VOCABULARY = 64, 12, 8, 300
EXTREMES = (0, 1, 2, 3, 63, 64, 65, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", ())


@pytest.fixture(scope="module")
def intact(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of two splits, without a copy of the tokenizer, whose checks have tests of their own."""
    folder = tmp_path_factory.mktemp("intact") / "set"
    folder.mkdir()
    draw = np.random.default_rng(0)
    _, info = load_tokenizer(tokenizer_folder)
    rows = [
        PackedRow(
            draw.integers(2, 290, ROW).astype(np.uint16),
            np.array([20, -24, 60, -ROW], np.int32),
            [Span(f"a{i}", 0, 20, 0), Span(f"b{i}", 24, 36, 0)],
        )
        for i in range(ROWS)
    ]
    splits = {split: write_split(folder, split, rows, "s", SHARD_ROWS) for split in ("train", "validation")}
    Manifest(ROW, "uint16", "s", replace(info, golden={"x": [5]}), splits).save(folder)
    return folder


def use(folder: Path) -> tuple[set[bytes], int]:
    """Read a dataset as training does; return the rows that were read, and the number of masked ones."""
    manifest = Manifest.load(folder)
    if manifest.vocab_size > MODEL_VOCABULARY:
        return set(), 0  # `check_data` refuses it
    seen: set[bytes] = set()
    damaged = set()
    for sources in (Sources({"": Dataset(folder)}), held_out_sources({"": Dataset(folder, "validation")})):
        ledger = Ledger(100, 1.0, [sources])
        recipe = single_source_recipe(0, 4 * sources.row_len, sources.row_len)
        stream = TrainStream(sources, recipe)
        preview_run(stream, 3)
        steps = [next(stream) for _ in range(3)]
        batches = [*(batch for step in steps for batch in step), *validation_batches(sources, sources.row_len, 2, 0, 1)]
        ledger.record(batches)
        damaged.update(ledger.merge([ledger.unshared]))
        for batch in batches:
            assert 0 <= batch.input_ids.min() <= batch.input_ids.max() < MODEL_VOCABULARY
            assert batch.cu_seqlens[-1] == batch.input_ids.size
            seen |= {
                row.tobytes() for row, labels in zip(batch.input_ids, batch.labels, strict=True) if labels.max() > 0
            }
        attempt(lambda stream=stream: documents_at(stream, 1))
        rows = [sources.read(0, row) for row in range(sources.datasets[0].num_rows)]
        Bigram.count(((tokens, ends) for tokens, ends, damage in rows if damage is None), manifest.vocab_size)
    return seen, len(damaged)


def inspect(folder: Path) -> None:
    """Run the data commands on a dataset; each ends, with an answer or one line."""
    for command in (lambda: describe(folder), lambda: show_row(folder, 3), lambda: verify(folder)):
        attempt(command)
    attempt(lambda: reindex(folder, skip_damaged=True))


class Target:
    """A copy of a dataset that is restored after each case."""

    def __init__(self, intact: Path, folder: Path):
        shutil.copytree(intact, folder)
        self.folder = folder
        self.files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.rows, damaged = use(folder)
        assert (len(self.rows), damaged) == (ROWS, 0)

    def check(self, inspected: bool) -> Any:
        """Read the dataset; every row must be one of the intact dataset's."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # overflows
            warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, for damaged types
            outcome = attempt(lambda: use(self.folder))
            if inspected:
                inspect(self.folder)
        if not isinstance(outcome, Exception):
            assert outcome[0] <= self.rows, "a row that was not written"
        return outcome

    def restore(self) -> None:
        for path, content in self.files.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


@pytest.fixture
def target(intact: Path, tmp_path: Path) -> Target:
    return Target(intact, tmp_path / "set")


def test_mutations_of_the_manifest(target: Target) -> None:
    path = target.folder / "manifest.json"
    values = json.loads(path.read_text())

    def check(draw: random.Random) -> None:
        if draw.random() < 0.8:
            path.write_text(json.dumps(mutate_json(draw, values)))
        else:
            path.write_bytes(mutate_bytes(draw, target.files[path]))
        target.check(inspected=draw.random() < 0.1)
        target.restore()

    run_cases(1000, check)


def test_mutations_of_any_file(target: Target) -> None:
    paths = [*target.files]

    def check(draw: random.Random) -> None:
        path = draw.choice(paths)
        path.write_bytes(mutate_bytes(draw, target.files[path]))
        target.check(inspected=True)
        target.restore()

    run_cases(200, check)


def relist(folder: Path, name: str, index: np.ndarray) -> None:
    """Write a shard's index and enter it in the manifest, as a wrong writer would: all checksums agree."""
    path = folder / "manifest.json"
    values = parse_json(path.read_text())
    write_index(folder / name, index)
    for shards in values["splits"].values():
        for shard in shards:
            if shard["name"] == name:
                shard["index_sha256"] = index_digest(index)
    path.write_text(json.dumps(values))


def test_mutations_of_an_index_that_the_manifest_lists(target: Target) -> None:
    def check(draw: random.Random) -> None:
        name = draw.choice(("train/000000.tar", "validation/000001.tar"))
        index = read_index(target.folder / name).copy()
        for _ in range(draw.choice((1, 1, 2))):
            field, row = draw.choice(INDEX.names), draw.randrange(len(index))
            bits = 8 * INDEX[field].itemsize
            change: Callable[[int], int] = draw.choice(
                (
                    lambda old: old + draw.choice((-1, 1, 4, -512, 512)),
                    lambda old: draw.choice(EXTREMES),
                    lambda old: old ^ 1 << draw.randrange(64),
                    lambda old: draw.getrandbits(64),
                )
            )
            index[field][row] = change(int(index[field][row])) % 2**bits
        if draw.random() < 0.1:
            index = draw.choice((index[:-1], index[::-1].copy(), np.concatenate([index, index[:1]]), index[:0]))
        relist(target.folder, name, index)
        target.check(inspected=False)
        target.restore()

    run_cases(300, check)


def test_mutations_of_rows_that_every_checksum_confirms(target: Target) -> None:
    """Write other tokens and ends, and the row's CRC32 into the index: only the invariants can find them."""

    def check(draw: random.Random) -> None:
        name = draw.choice(("train/000000.tar", "validation/000000.tar"))
        index, shard = read_index(target.folder / name).copy(), target.folder / name
        content, row = bytearray(shard.read_bytes()), draw.randrange(SHARD_ROWS)
        tokens = np.frombuffer(content, "<u2", ROW, int(index["tokens"][row])).copy()
        ends = np.frombuffer(content, "<i4", int(index["segments"][row]), int(index["ends"][row])).copy()
        if draw.random() < 0.7:
            values = [0, 1, -1, 20, -20, 60, 64, -64, 65, 128, 2**31 - 1, -(2**31), draw.randint(-70, 70)]
            ends[draw.randrange(len(ends))] = draw.choice(values)
        else:
            tokens[draw.randrange(ROW)] = draw.choice((299, 300, 2**15, 2**16 - 1))
        if draw.random() < 0.3:
            index["valid"][row] = draw.randrange(ROW + 2)
        index["crc"][row] = row_crc(tokens, ends)
        at = int(index["tokens"][row])
        content[at : at + 2 * ROW] = tokens.tobytes()
        at = int(index["ends"][row])
        content[at : at + 4 * len(ends)] = ends.tobytes()
        shard.write_bytes(content)
        relist(target.folder, name, index)
        outcome = attempt(lambda: use(target.folder))
        sound = not segments.find_fault(ends, ROW) and tokens.max() < MODEL_VOCABULARY
        if not isinstance(outcome, Exception) and not sound:
            assert outcome[1] == 1, "the row was used"
        target.restore()

    run_cases(300, check)


def test_a_manifest_that_is_no_dataset_is_one_line(intact: Path, tmp_path: Path) -> None:
    """Each field that training depends on, with a value out of its range."""
    manifest = Manifest.load(intact)
    shard, tokenizer = manifest.splits["train"][0], manifest.tokenizer

    def shards(**changes: Any) -> dict[str, list[ShardInfo]]:
        return {"train": [replace(shard, **changes)], "validation": []}

    broken = {
        "row length 3000000 is not supported": replace(manifest, row_len=3_000_000),
        "row_len 4294967296 is above 1073741824": replace(manifest, row_len=2**32),
        "dtype 'int8' is neither": replace(manifest, dtype="int8"),
        "vocab_size 65537 is not from 1 to 65536": replace(manifest, tokenizer=replace(tokenizer, vocab_size=65_537)),
        "eos_id 900 is not below vocab_size": replace(manifest, tokenizer=replace(tokenizer, eos_id=900)),
        "pad_id -1 is not below vocab_size": replace(manifest, tokenizer=replace(tokenizer, pad_id=-1)),
        "a golden text has ids": replace(manifest, tokenizer=replace(tokenizer, golden={"x": ["y"]})),
        "split 'test' is neither": replace(manifest, splits={"test": []}),
        "is listed twice": replace(manifest, splits={"train": [shard, shard], "validation": []}),
        "rows -1 is not from 0": replace(manifest, splits=shards(rows=-1)),
        "tokens 513 is not from 0 to 512": replace(manifest, splits=shards(tokens=SHARD_ROWS * ROW + 1)),
        "bytes of 1329 bits is not": replace(manifest, splits=shards(bytes=10**400)),
        "a sha256 is not 64": replace(manifest, splits=shards(sha256="x")),
        "an entry of skipped": replace(manifest, skipped=[{"path": 1}]),
        "not valid Unicode": replace(manifest, source="\ud800"),
    }
    for words, one in broken.items():
        one.save(tmp_path)
        error = attempt(lambda: Manifest.load(tmp_path))
        assert words in str(error)
        assert str(error).startswith(f"{tmp_path}/manifest.json: ")
