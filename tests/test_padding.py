"""Padding, wherever it is in a row, is no text: no consumer of a row counts it, and no text around it is lost."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli, counting_dataset, export_small, settings, write_split

from data_tools.build import build_shards
from data_tools.inspection import show_row
from data_tools.options import BuildOptions
from fusiontree.cli import main
from fusiontree.data import segments
from fusiontree.data.batch import BadRow, collate
from fusiontree.data.format import Dataset, Manifest, TokenizerInfo
from fusiontree.data.packing import PackedRow, Span
from fusiontree.data.preview import preview_run
from fusiontree.data.sources import Ledger, Sources, held_out_sources
from fusiontree.data.stream import TrainStream, single_source_recipe, validation_batches
from fusiontree.distributed.collectives import World
from fusiontree.errors import RunError, UserError
from fusiontree.evaluate import tasks
from fusiontree.evaluate.held_out import HeldOutLoss
from fusiontree.evaluate.ngram import Bigram
from fusiontree.evaluate.options import TASK_NAMES, EvalOptions
from fusiontree.evaluate.subject import Subject
from fusiontree.run import incidents

ROW, PAD = 16, 5  # the padding token also occurs in documents
# segment ends of rows: padding at the end, in the middle, at the start, everywhere, nowhere
ENDS = ([10, -16], [3, -8, 12, -16], [-4, 9, 16], [-16], [6, 16], [1, -2, 3, -16])


def packed_row(number: int, ends: list[int]) -> PackedRow:
    tokens = np.arange(ROW, dtype=np.uint16) % 7 + number
    spans, start = [], 0
    for end in ends:
        if end > 0:
            spans.append(Span(f"{number}-{start}", start, end - start, 0))
        else:
            tokens[start:-end] = PAD
        start = abs(end)
    return PackedRow(tokens, np.array(ends, np.int32), spans)


def write(folder: Path, rows: list[PackedRow], split: str = "validation") -> Dataset:
    folder.mkdir()
    splits = {name: write_split(folder, name, rows if name == split else [], "s") for name in ("train", "validation")}
    Manifest(ROW, "uint16", "s", TokenizerInfo("f", 60, 0, PAD), splits).save(folder)
    return Dataset(folder, split)


@pytest.fixture
def rows() -> list[PackedRow]:
    return [packed_row(number, ends) for number, ends in enumerate(ENDS)]


def documents_of(rows: list[PackedRow]) -> list[list[int]]:
    """Return the documents by the spans, which the writer takes from the packer and not from the ends."""
    return [row.tokens[s.start : s.start + s.length].tolist() for row in rows for s in row.spans]


def test_every_reader_finds_the_same_documents(tmp_path: Path, rows: list[PackedRow]) -> None:
    dataset, expected = write(tmp_path / "set", rows), documents_of(rows)
    found = [document.tolist() for row in range(len(rows)) for document in segments.documents(*dataset.row(row))]
    assert found == expected
    assert (
        sum(segments.count_tokens(row.ends) for row in rows) == int(dataset.valid_tokens.sum()) == sum(map(len, found))
    )

    subject = Subject(None, None, {}, tmp_path, dataset, (500,), ROW, None, 1)
    text = subject.text
    joined = list(itertools.chain(*expected))
    assert len(text) > 500
    assert text.tolist() == (joined * len(text))[: len(text)]

    batches = list(validation_batches(Sources({"": dataset}), ROW, 4, 0, 1))
    labelled = [token for document in expected for token in document[1:]]
    assert [int(label) for batch in batches for label in batch.labels[batch.labels >= 0]] == labelled
    held_out = HeldOutLoss(Sources({"": dataset}), World(0, 1, torch.device("cpu")))
    for batch in batches:
        held_out.add(batch, torch.from_numpy(batch.labels >= 0).double())
    assert held_out.means().total == (pytest.approx(1), len(labelled))
    assert {sum(mean.tokens for mean in part.values()) for part in held_out.means()[1:]} == {len(labelled)}

    shown = [show_row(tmp_path / "set", row, "validation") for row in range(len(rows))]
    assert [document["length"] for row in shown for document in row["documents"]] == list(map(len, expected))


def test_n_grams_count_documents_alone(rows: list[PackedRow]) -> None:
    expected = documents_of(rows)
    bigram = Bigram.count(((row.tokens, row.ends) for row in rows), 60)
    tokens = Counter(itertools.chain(*expected))
    assert bigram.counts.tolist() == [tokens[token] for token in range(60)]
    pairs = Counter(pair for document in expected for pair in itertools.pairwise(document))
    assert bigram.pairs.tolist() == sorted(a * 60 + b for a, b in pairs)
    assert bigram.pair_counts.sum() == pairs.total()


def test_preview_counts_the_padding_of_every_row(tmp_path: Path, rows: list[PackedRow]) -> None:
    sources = Sources({"": write(tmp_path / "set", rows, "train")})
    figures = preview_run(TrainStream(sources, single_source_recipe(0, 6 * ROW, ROW)), 2)
    assert figures["padding"] == pytest.approx(1 - len(list(itertools.chain(*documents_of(rows)))) / (6 * ROW))


@pytest.mark.parametrize(
    "ends", [[], [5], [17], [16, 16], [8, 4, 16], [0, 16], [-(2**31), 16], [16, 2**31 - 1], [8, -(2**31), 16]]
)
def test_ends_that_do_not_cover_the_row_have_a_fault(ends: list[int]) -> None:
    assert segments.find_fault(np.array(ends, np.int32), ROW) == "segment ends do not ascend to the row's length 16"


@pytest.mark.parametrize("ends", ENDS)
def test_ends_that_cover_the_row_have_none(ends: list[int]) -> None:
    assert segments.find_fault(np.array(ends, np.int32), ROW) == ""


# --- nothing but padding ---------------------------------------------------------------------------------------------


def test_a_split_of_padding_is_empty(tmp_path: Path) -> None:
    padding = [packed_row(0, [-ROW])]
    with pytest.raises(UserError, match="split train is empty"):
        Sources({"": write(tmp_path / "train", padding, "train")})
    with pytest.raises(UserError, match="no held-out rows"):
        held_out_sources({"": write(tmp_path / "held-out", padding)})


def test_held_out_rows_without_a_label_have_no_loss(tmp_path: Path) -> None:
    singles = [packed_row(0, [1, -16]), packed_row(1, [-3, 4, -16])]  # documents of one token
    held_out = HeldOutLoss(held_out_sources({"": write(tmp_path / "set", singles)}), World(0, 1, torch.device("cpu")))
    for batch in validation_batches(held_out.sources, ROW, 2, 0, 1):
        held_out.add(batch, torch.zeros(batch.labels.shape))
    with pytest.raises(UserError, match="set has no held-out token to predict; run `fusiontree data verify`"):
        held_out.figures()


def test_rows_without_a_pair_give_no_bigram(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", [packed_row(0, [1, -16])])
    with pytest.raises(
        UserError, match=r"first 1 training rows give no n-gram baseline \(no document has two tokens\)"
    ):
        _ = Subject(None, None, {}, tmp_path, dataset, (8,), ROW, None, 1).bigram


# --- damage as a share of the rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tolerated"), [(1, 0), (2, 1), (9, 1), (20, 2), (95, 9), (5000, 100)])
def test_damage_is_limited_as_a_share_of_a_sources_rows(tmp_path: Path, rows: int, tolerated: int) -> None:
    dataset = counting_dataset(tmp_path / "set", 1, 2)
    dataset._starts = np.array([0, rows])
    ledger = Ledger(100, 0.1, [Sources({"web": dataset})])
    batch = collate(np.zeros((1, 4), np.uint16), [segments.only_padding(4)])

    def damage(count: int, split: str) -> None:
        bad = tuple(BadRow("web", f"{split}/000000.tar", row, "there", "is damaged") for row in range(count))
        ledger.record([type(batch)(**{**vars(batch), "damaged": bad})])

    damage(tolerated, "train")
    with pytest.raises(RunError, match=r"data\.max_bad_(share|rows)") as raised:
        damage(tolerated + 1, "train")
    if tolerated < 100:
        assert f"{tolerated + 1} of the {rows} train rows of web; data.max_bad_share is 0.1" in str(raised.value)


def damaged_copy(shards: Path, target: Path, split: str) -> Path:
    """Copy a dataset and damage every row of a split."""
    shutil.copytree(shards, target)
    for shard in Dataset(target, split).shards:
        with open(shard.path, "r+b") as stream:
            for offset in shard.index["tokens"].tolist():
                stream.seek(offset)
                stream.write(b"\xff\xff\xff\xff")
    return target


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_run_over_damaged_rows_only_stops(shards: Path, tmp_path: Path, split: str) -> None:
    copy = damaged_copy(shards, tmp_path / "copy", split)
    done = cli("train", "tiny", *settings(copy, tmp_path / "runs", name="r"), code=1)
    assert "data.max_bad_share is 0.1" in done.stderr
    assert done.stderr.count("stored rows could not be used") == 1
    assert not (tmp_path / "runs/r/checkpoints").exists()


@pytest.mark.slow
def test_an_update_without_a_token_is_skipped_and_recorded(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / name).write_text("tree gate")
    build_shards([tmp_path / "in"], tokenizer_folder, tmp_path / "set", BuildOptions(row_len=512, holdout=0))
    changes = {"batch__tokens": 128, "batch__micro_rows": 1, "validation__every": 0, "schedule__steps": 4}
    cli("train", "tiny", *settings(tmp_path / "set", tmp_path / "runs", name="r", **changes))
    run = tmp_path / "runs" / "r"
    found = incidents.read(run)
    assert [line["kind"] for line in found] == ["skipped_update"] * 3  # three of the four slices are padding
    assert all("no token to predict in this batch: update skipped; rows: " in line["message"] for line in found)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 1
    assert losses[0] > 1


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_a_fault_of_the_data_ends_an_evaluation_before_its_first_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(None, None, {}, tmp_path, write(tmp_path / "set", [packed_row(0, [-16])]), (8,), ROW, None, 1)
    monkeypatch.setattr(Subject, "load", lambda *_, **__: subject)
    started: list[str] = []
    monkeypatch.setattr(tasks, "TASKS", {name: lambda _, name=name: started.append(name) for name in tasks.TASKS})
    for name in tasks.TASKS:
        with pytest.raises(UserError, match=r"set: (no held-out rows|the first \d training rows)"):
            tasks.evaluate(tmp_path, [name], EvalOptions(str(tmp_path / "set")))
    assert started == []
    assert tasks._READS.keys() == tasks.TASKS.keys() == {*TASK_NAMES}


@pytest.mark.slow
def test_eval_over_rows_that_end_in_padding(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    build_shards([corpus], tokenizer_folder, tmp_path / "data", BuildOptions(row_len=4096, holdout=0.1))
    assert Dataset(tmp_path / "data", "validation").row(0)[1][-1] < 0
    exported = export_small(tmp_path, tokenizer_folder)
    words = ["--tasks", "perplexity,needle,throughput", "--lengths", "80", "--samples", "1", "--seq-len", "128"]
    assert main(["eval", str(exported), "--data", str(tmp_path / "data"), *words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"perplexity", "needle", "throughput"}
