"""`data plan` counts, and `data at` lists, exactly the tokens and rows that the training stream delivers."""

import dataclasses
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import counting_dataset, in_process

from data_tools.build import build_shards
from data_tools.options import BuildOptions
from fusiontree.cli import main
from fusiontree.data.preview import documents_at, preview_run
from fusiontree.data.sources import Sources
from fusiontree.data.stream import Recipe, TrainStream, single_source_recipe

ROW = 32  # tokens of a packed row


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    return Sources({"web": counting_dataset(root / "web", 90, 2), "code": counting_dataset(root / "code", 10, 10_002)})


RECIPE = Recipe(
    seed=1,
    batch_tokens=8 * ROW,
    lengths=((0, 8), (5, 32)),
    weights=((0, (Fraction(3), Fraction(1))), (10, (Fraction(1), Fraction(1)))),
    max_epochs=(None, Fraction(6)),
)


def test_preview_counts_equal_the_streams_tokens(sources: Sources) -> None:
    stream = TrainStream(sources, RECIPE, 1)
    figures = preview_run(stream, 40)
    tokens: Counter[str] = Counter()
    for batches in (next(stream) for _ in range(40)):
        for batch in batches:
            for row in batch.input_ids.tolist():
                tokens["code" if row[0] > 10_000 else "web"] += len(row)
    assert {name: source["tokens"] for name, source in figures["sources"].items()} == tokens
    assert figures["tokens"] == 40 * 8 * ROW == tokens.total()
    assert tokens["code"] == 60 * ROW  # its cap of 6 epochs
    assert figures["sources"]["code"]["epochs"] == 6
    assert figures["sources"]["code"]["used_up_at_step"] == 19  # 20 rows in 10 steps, then 4 rows per step
    assert figures["sources"]["web"]["used_up_at_step"] is None
    assert figures["padding"] == 0


def test_preview_has_a_stage_for_each_change(sources: Sources) -> None:
    stages = preview_run(TrainStream(sources, RECIPE, 1), 40)["stages_from_step"]
    shape = [(first, stage["steps"], stage["seq_len"], stage["rows_per_step"]) for first, stage in stages.items()]
    assert shape == [("0", 5, 8, 32), ("5", 5, 32, 8), ("10", 30, 32, 8)]
    code = [stage["sources"]["code"] for stage in stages.values()]
    assert [source["epochs"] for source in code] == pytest.approx([1, 1, 4])
    assert [source["tokens"] for source in code] == [10 * ROW, 10 * ROW, 40 * ROW]
    for stage in stages.values():
        assert (
            sum(source["tokens"] for source in stage["sources"].values()) == stage["tokens"] == stage["steps"] * 8 * ROW
        )
    assert preview_run(TrainStream(sources, RECIPE, 1), 3)["stages_from_step"].keys() == {"0"}


def test_preview_warns_of_more_than_four_epochs_and_not_of_four(sources: Sources) -> None:
    stream = TrainStream(sources, dataclasses.replace(RECIPE, lengths=((0, ROW),)), 1)
    (warning,) = preview_run(stream, 16)["warnings"]
    assert warning.startswith("code is read 4.4 times")
    assert preview_run(stream, 15)["sources"]["code"]["epochs"] == 4
    assert preview_run(stream, 15)["warnings"] == []


def test_preview_warns_of_rows_shorter_than_a_cell(sources: Sources) -> None:
    def warnings(steps: int, *lengths: tuple[int, int]) -> list[str]:
        return preview_run(TrainStream(sources, dataclasses.replace(RECIPE, lengths=lengths), 1), steps)["warnings"]

    (warning,) = warnings(15, (0, 8), (2, 16), (5, 32))
    assert warning.startswith("rows of 8 and 16 tokens are shorter than the cells of 32 ")
    assert warnings(15, (0, 32)) == []
    assert len(warnings(6, (0, 32), (5, 8))) == 1
    assert warnings(5, (0, 32), (5, 8)) == []  # the run ends before the change


@pytest.mark.parametrize(("seq_len", "warnings"), [(2048, 1), (4096, 0), (8192, 0)])
def test_cells_of_long_rows_are_packing_cells(tmp_path: Path, seq_len: int, warnings: int) -> None:
    dataset = counting_dataset(tmp_path / "long", 4, 2, row_len=8192)
    stream = TrainStream(Sources({"": dataset}), single_source_recipe(0, 8192, seq_len), 1)
    assert len(preview_run(stream, 1)["warnings"]) == warnings


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_run_that_ends_inside_a_packed_row_counts_every_token(sources: Sources, steps: int) -> None:
    recipe = Recipe(0, 8, ((0, 8),), ((0, (Fraction(3), Fraction(1))),), (None, None))
    figures = preview_run(TrainStream(sources, recipe, 1), steps)
    assert sum(source["tokens"] for source in figures["sources"].values()) == figures["tokens"] == 8 * steps
    assert sum(source["share"] for source in figures["sources"].values()) == pytest.approx(1)


def test_padding_equals_the_sources_padding(shards: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"data.path={shards}", "data.seq_len=128", "batch.tokens=1024", "schedule.steps=20"]
    assert main(["data", "plan", "tiny", *words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    totals = json.loads((shards / "manifest.json").read_text())["totals"]["train"]
    assert figures["padding"] == pytest.approx(1 - totals["tokens"] / (totals["rows"] * 512))
    (source,) = figures["sources"].values()
    assert (source["tokens"], source["share"]) == (20 * 1024, 1)
    assert [stage["padding"] for stage in figures["stages_from_step"].values()] == pytest.approx([figures["padding"]])


@pytest.mark.parametrize("step", [0, 4, 5, 21])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (3, 4)])
def test_documents_at_a_step_match_the_batch(sources: Sources, step: int, rank: int, world: int) -> None:
    stream = TrainStream(sources, RECIPE, 1, rank, world)
    figures = documents_at(stream, step)
    stream.seek(step * RECIPE.batch_rows)
    batches = next(stream)
    rows = [(number, row) for number, batch in enumerate(batches) for row in batch.input_ids.tolist()]
    assert len(rows) == len(figures["rows"])
    for (number, row), listed in zip(rows, figures["rows"], strict=True):
        assert listed["batch"] == number
        lowest = {"web": 2, "code": 10_002}[listed["source"]]
        shard_first = int(Path(listed["shard"]).stem) * 40
        assert row[0] == lowest + (shard_first + listed["row"]) * ROW + listed["first_token"]
        stored = (row[0] - lowest) // ROW
        first, end = listed["first_token"], listed["first_token"] + len(row)
        documents = [("a", 0, 20), ("b", 20, 32)]
        clipped = [(n, start, stop, max(start, first), min(stop, end)) for n, start, stop in documents]
        assert listed["documents"] == [
            {"id": f"{stored}{n}", "start": a - first, "length": b - a, "offset": a - start, "continues": b < stop}
            for n, start, stop, a, b in clipped
            if b > a
        ]


def test_rows_without_a_document_are_shown_as_padding(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / name).write_text("tree gate")
    build_shards([tmp_path / "in"], tokenizer_folder, tmp_path / "set", BuildOptions(row_len=512, holdout=0))
    words = ["tiny", f"data.path={tmp_path / 'set'}", "data.seq_len=128", "batch.tokens=512", "model.vocab_size=512"]
    shown = in_process("data", "at", *words, "--step", 0).stdout.splitlines()
    assert len([line for line in shown if line.startswith("batch ")]) == 4
    assert shown.count("  only padding") == 3
    assert len([line for line in shown if line.endswith(" from 0") and not line.startswith("batch")]) == 2


def test_commands_print_readable_text_and_refuse_in_one_line(shards: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(shards, twin)
    words = ["tiny", "data.seq_len=128", "batch.tokens=1024", f"data.sources.a.path={shards}"]
    words += [f"data.sources.b.path={twin}", "schedule.steps=20", "data.curriculum={0: 64, 8: 128}"]
    shown = in_process("data", "plan", *words).stdout
    assert "stages from step" in shown
    stage = shown[shown.index("stages from step") :]
    assert [line.split()[0] for line in stage.splitlines()].count("tokens") == 2 * (1 + 2)  # of a stage, and by source
    assert "used up at step" in shown
    shown = in_process("data", "at", *words, "--step", 3, "--rank", 1, "--world-size", 2).stdout.splitlines()
    assert sum(line.startswith("batch ") for line in shown) == 8
    assert any(line.endswith(".txt from 0") for line in shown)
    capped = ["data.sources.a.max_epochs=0.1", "data.sources.b.max_epochs=0.1", "schedule.steps=200"]
    error = in_process("data", "plan", *words, *capped, code=2).stderr
    assert "the sources are exhausted after step" in error
    assert "max_epochs of a or b" in error
    assert error.count("\n") == 1
    assert (
        "--step 20 is out of range; the run has steps 0 to 19"
        in in_process("data", "at", *words, "--step", 20, code=2).stderr
    )
    assert (
        "--rank 2 is out of range; --world-size 2 has ranks 0 to 1"
        in in_process("data", "at", *words, "--step", 2, "--rank", 2, "--world-size", 2, code=2).stderr
    )
    alone = in_process("data", "at", *words, "--step", 2, "--rank", 0, code=2).stderr
    assert "--rank 0 needs --world-size; give the number of ranks at that step" in alone
