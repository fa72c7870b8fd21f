"""Evaluation: losses add up by position, n-gram counts match plain counting, answers are scored exactly."""

import dataclasses
import itertools
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, build, export_small, write_run

from fusiontree.cli import main
from fusiontree.errors import UserError
from fusiontree.evaluate import heatmap, held_out
from fusiontree.evaluate.ngram import Bigram
from fusiontree.evaluate.options import TASK_NAMES, EvalOptions
from fusiontree.evaluate.retrieval import DEPTHS, PAIRS, Probe, _bigram_solves, _hide, _solve
from fusiontree.evaluate.subject import Subject
from fusiontree.evaluate.tasks import TASKS, evaluate
from fusiontree.export.exporter import export
from fusiontree.inference.generate import stream_tokens
from fusiontree.inference.sampling import Sampling

TABLES = ("by_position", "by_document", "by_pairs", "cells")


def rows_of(table: dict | list) -> list[dict]:
    return table if isinstance(table, list) else list(table.values())


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tmp_path_factory.mktemp("runs"), tokenizer_folder)


def test_bigram_losses_match_plain_counting() -> None:
    draw = random.Random(0)
    documents = [[draw.randrange(6) for _ in range(draw.randint(1, 30))] for _ in range(20)]
    halves = itertools.pairwise(documents)
    packed = list(itertools.islice(halves, 0, None, 2))
    rows = [(np.array(a + b, dtype=np.uint16), np.array([len(a), len(a) + len(b)])) for a, b in packed]
    bigram = Bigram.count(rows, 8)
    tokens = Counter(token for document in documents for token in document)
    pairs = Counter(pair for document in documents for pair in itertools.pairwise(document))
    for before in range(8):
        followers = {b: count for (a, b), count in pairs.items() if a == before}
        for after in range(8):
            unigram = (tokens[after] + 1) / (sum(tokens.values()) + 8)
            total, kinds = sum(followers.values()), len(followers)
            p = (followers.get(after, 0) + kinds * unigram) / (total + kinds) if total else unigram
            (found,) = bigram.losses(np.array([before]), np.array([after]))
            assert found == pytest.approx(-math.log(p))
        if followers:
            assert followers[bigram.likeliest(before)] == max(followers.values())
    assert bigram.likeliest(7) == max(tokens, key=tokens.__getitem__)


def test_perplexity_adds_up_by_position_and_document(
    exported: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "BOUNDS", (2, 4, 8, 16, 64))  # shorter than a test's rows
    figures = evaluate(exported, ["perplexity"], EvalOptions(shards, limit=5))["perplexity"]
    assert tuple(figures["by_position"]) == held_out.BUCKETS
    by_position = figures["by_position"].values()
    assert sum(bucket["tokens"] for bucket in by_position) == figures["tokens"]
    total = sum(bucket["loss"] * bucket["tokens"] for bucket in by_position)
    assert total / figures["tokens"] == pytest.approx(figures["loss"], rel=1e-5)
    assert figures["chance_loss"] == math.log(512)
    assert figures["bigram_loss"] < figures["unigram_loss"] < figures["chance_loss"]
    for name in ("loss", "bigram_loss"):
        low, median, high = (row[name] for row in list(figures["by_document"].values())[:3])
        assert low <= median <= high
    assert figures["by_document"]["highest"]["loss"] >= high
    total = sum(bucket["bigram_loss"] * bucket["tokens"] for bucket in by_position)
    assert total / figures["tokens"] == pytest.approx(figures["bigram_loss"], rel=1e-5)


def test_an_answer_is_correct_if_every_token_is_the_likeliest() -> None:
    model = build()
    prompt = list(range(5, 60))
    answer = [token for (token,) in stream_tokens(model, [prompt], 4, Sampling(temperature=0), None)]
    right, loss = _solve(model, Probe(prompt, answer))
    assert right
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert loss == pytest.approx(-logits.gather(1, torch.tensor(answer)[:, None]).mean().item(), rel=1e-4)
    assert not _solve(model, Probe(prompt, [*answer[:-1], (answer[-1] + 1) % 96]))[0]
    wrong = [(answer[0] + 1) % 96]
    wrong += [token for (token,) in stream_tokens(model, [prompt + wrong], 1, Sampling(temperature=0), None)]
    assert not _solve(model, Probe(prompt, wrong))[0]
    bigram = Bigram.count([(np.array([3, 4, 5, 3, 4, 5]), np.array([6]))], 8)
    assert _bigram_solves(bigram, Probe([7, 3], [4, 5]))
    assert not _bigram_solves(bigram, Probe([7, 3], [4, 4]))


def test_a_needle_is_hidden_at_its_depth() -> None:
    hay = list(range(100))
    for depth, place in zip(DEPTHS, (0, 25, 50, 75, 100), strict=True):
        probe = _hide(hay, [-1], depth, [-2], [-3])
        assert probe.prompt.index(-1) == place
        assert probe.prompt[-1] == -2


def test_all_tasks_report_figures_baselines_json_and_heat_maps(exported: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="heat maps need matplotlib: pip install 'fusiontree[eval]'")
    output = tmp_path / "results"
    options = EvalOptions(shards, lengths=(100, 120), limit=2, samples=2, output=output)
    results = evaluate(exported, list(TASKS), options)
    assert {path.name for path in output.iterdir()} == {"results.json", "passkey.png", "needle.png"}
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (output / "passkey.png").read_bytes().startswith(b"\x89PNG")
    for task, chance in (("passkey", 1 / 90_000), ("needle", 1 / 10)):
        assert len(results[task]["cells"]) == 2 * len(DEPTHS)
        assert results[task]["chance"] == chance
        assert 0 <= results[task]["bigram_accuracy"] <= 1
    rows = [row for task in results.values() for key in TABLES for row in rows_of(task.get(key, []))]
    assert len(rows) > 4 * len(DEPTHS)
    for row in rows:
        for name in ("loss", "accuracy", "answer_loss"):
            beside = {"accuracy": "chance"}.get(name, f"chance_{name}")
            assert name not in row or {f"bigram_{name}", beside} <= set(row)
    assert [entry["chance"] for entry in results["recall"]["by_pairs"].values()] == [1 / pairs for pairs in PAIRS]
    for figures in results["throughput"]["by_length"].values():
        assert figures["first_token"]["p95_seconds"] >= figures["first_token"]["median_seconds"] > 0
        assert figures["prefill_tokens_per_s"] > 0 < figures["tokens_per_s"]
    assert tuple(TASKS) == TASK_NAMES


def test_a_heat_map_shows_chance_and_the_bigram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib: pip install 'fusiontree[eval]'")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    cells = [{"length": n, "depth": 0.5, "accuracy": n / 100, "bigram_accuracy": 0.5} for n in (20, 100)]
    heatmap.draw(tmp_path / "x.png", "needle", cells, 0.1)
    (axes,) = drawn
    assert axes.get_title() == "needle, chance 0.1"
    assert [text.get_text() for text in axes.texts] == ["20%\nbigram 50%", "100%\nbigram 50%"]


def test_a_prompt_longer_than_the_time_encoding_is_refused(
    tokenizer_folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shape = {"vocab_size": 512, "srte": "learned"}
    write_run(
        tmp_path / "run", dataclasses.replace(SMALL, **shape), build(**shape).state_dict(), tokenizer_folder, 0, 1
    )
    export(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--data", str(shards), "--tasks", "recall"]) == 2
    line = capsys.readouterr().err
    assert "tokens exceed the learned time encoding's 128 positions; use fewer tokens" in line
    assert line.count("\n") == 1
    words = ["eval", str(tmp_path / "out"), "--data", str(shards), "--tasks", "throughput", "--lengths"]
    assert main([*words, "93"]) == 2  # with the tokens generated after the prompt
    assert "129 tokens exceed the learned time encoding's 128 positions; use fewer tokens" in capsys.readouterr().err
    assert main([*words, "92"]) == 0


def test_data_with_tokens_outside_the_models_vocabulary_are_refused(
    tokenizer_folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_run(tmp_path / "run", SMALL, build().state_dict(), tokenizer_folder, 0, 1)
    export(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--data", str(shards), "--tasks", "passkey"]) == 2
    assert f"{shards} has token ids up to 299, but the model's largest is 95" in capsys.readouterr().err


def test_a_prompt_with_a_token_outside_the_models_vocabulary_is_refused(exported: Path, shards: Path) -> None:
    subject = Subject.load(exported, EvalOptions(shards, samples=1))
    assert subject.ids("a zebra")
    subject.tokenizer.add_tokens([f"<{i}>" for i in range(512)] + ["zebra"])
    with pytest.raises(UserError, match=r"'a zebra' by .*/out's tokenizer: token \d+ is out of range"):
        subject.ids("a zebra")


def test_invalid_evaluations_are_refused_in_one_line(
    exported: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for options, words in (
        (["--tasks", ","], "--tasks is empty; choose from perplexity, passkey"),
        (["--tasks", "poetry"], "--tasks 'poetry' is unknown; choose from perplexity, passkey"),
        (["--tasks", "passkey", "--lengths", "1k"], "--lengths is '1k'; give integers separated by commas"),
        (["--tasks", "passkey", "--lengths", "0"], "--lengths is 0; it must be at least 1"),
        (["--tasks", "passkey", "--lengths", "100000000000000"], "it must be at most 16,777,216"),
        (["--tasks", "passkey", "--samples", "0"], "--samples is 0"),
        (["--tasks", "passkey", "--lengths", "20"], "--lengths 20 is too short for passkey"),
        (["--tasks", "passkey", "--output", str(shards)], "has other contents"),
    ):
        assert main(["eval", str(exported), "--data", str(shards), *options]) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    shutil.copytree(shards, tmp_path / "all")
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    manifest["splits"]["validation"] = []
    (tmp_path / "all" / "manifest.json").write_text(json.dumps(manifest))
    for task in ("perplexity", "needle"):
        assert main(["eval", str(exported), "--data", str(tmp_path / "all"), "--tasks", task]) == 2
        assert (
            "all: no held-out rows; rebuild with a larger --holdout from at least two documents"
            in capsys.readouterr().err
        )
    assert main(["eval", str(tmp_path), "--data", str(shards), "--tasks", "recall"]) == 2
    assert "is not an exported model" in capsys.readouterr().err
