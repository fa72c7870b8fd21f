"""One corpus gives one dataset, for any number of workers and interruptions; deduplication."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ranks
from conftest import cli

from data_tools.build import build_shards
from data_tools.duplicates import SeenTexts, digest
from data_tools.options import BuildOptions
from data_tools.verify import verify
from fusiontree.data.format import Dataset
from fusiontree.errors import RunError, UserError

OPTIONS = BuildOptions(row_len=256, holdout=0.1, dedup=True, encoder="tokenizers")  # slow enough to be interrupted
SMALL = {  # gives a small corpus many chunks, windows and shards
    "data_tools.build._CHUNK_RECORDS": 16,
    "data_tools.build.SAVE_SECONDS": 0.0,
    "data_tools.build.SAVE_SHARE": 1.0,
    "data_tools.assembly.WINDOW_DOCUMENTS": 90,
    "data_tools.assembly.SHARD_ROWS": 40,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 documents in files of three kinds, a fifth of them duplicates, with bad lines and a broken file."""
    folder = tmp_path_factory.mktemp("documents")
    draw = random.Random(1)
    words = ["tree", "gate", "branch", "scan", "window", "naïve", "東京", "row\n"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 300))) for _ in range(1200)]
    texts += draw.choices(texts, k=300)
    draw.shuffle(texts)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[100] = lines[900] = "{"
    (folder / "a.jsonl").write_text("\n".join(lines[:600]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[600:1100]).encode(), mtime=0))
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-4])
    (folder / "void.txt").touch()
    for number, text in enumerate(texts[1100:]):
        (folder / f"c{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(documents: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the dataset of `documents` without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        folder = tmp_path_factory.mktemp("uninterrupted") / "set"
        build_shards([documents], tokenizer_folder, folder, OPTIONS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_builds_the_same_bytes(
    uninterrupted: Path, documents: Path, tokenizer_folder: Path, tmp_path: Path, workers: int
) -> None:
    build_shards([documents], tokenizer_folder, tmp_path / "set", dataclasses.replace(OPTIONS, workers=workers))
    assert contents(tmp_path / "set") == contents(uninterrupted)
    assert len(list((uninterrupted / "train").glob("*.tar"))) > 4


def build_killed(documents: Path, tokenizer: Path, output: Path, steps: int, workers: int) -> None:
    """Build the dataset in this process, which is killed after `steps` file operations."""
    remaining = steps

    def count(event: str, arguments: tuple) -> None:
        nonlocal remaining
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and ".set" in str(arguments):
            remaining -= 1
            if remaining < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        sys.addaudithook(count)
        build_shards([documents], tokenizer, output, dataclasses.replace(OPTIONS, workers=workers))


def test_a_repeatedly_killed_build_gives_the_same_bytes(
    uninterrupted: Path, documents: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    output = tmp_path / "set"
    shards = []
    while not output.exists():
        assert len(shards) < 40, shards
        workers = 2 if len(shards) % 4 == 3 else 1
        steps = draw.randint(0, 100) * draw.choice([1, 2, 8])
        code = ranks.call(build_killed, documents, tokenizer_folder, output, steps, workers)
        assert code in (0, -signal.SIGKILL)
        shards.append(len(list(tmp_path.glob(".set.partial/train/*.tar"))))
    assert len([count for count in shards if count]) > 1, shards  # it resumed from saved states
    assert contents(output) == contents(uninterrupted)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".set")] == []


@pytest.fixture
def interrupted(documents: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a build; return its partial folder."""
    interrupt(documents, tokenizer_folder, tmp_path / "set", monkeypatch)
    return tmp_path / ".set.partial"


@pytest.fixture(scope="module")
def partial_template(documents: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupt a build once per module; each test copies the partial folder."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        interrupt(documents, tokenizer_folder, folder / "set", patch)
    return folder / ".set.partial"


def interrupt(documents: Path, tokenizer_folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_tools.assembly import Assembly

    added = []

    def add(self, records, *rest):
        added.append(records)
        if len(added) == 60:
            raise KeyboardInterrupt
        return original(self, records, *rest)

    original = Assembly.add
    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "add", add)
        with pytest.raises(KeyboardInterrupt):
            build_shards([documents], tokenizer_folder, output, OPTIONS)


def test_a_build_resumes_inside_a_packing_window(
    documents: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.assembly.WINDOW_DOCUMENTS", 10_000)  # more than there are documents
    build_shards([documents], tokenizer_folder, tmp_path / "uninterrupted", OPTIONS)
    interrupt(documents, tokenizer_folder, tmp_path / "set", monkeypatch)
    assert list((tmp_path / ".set.partial/train").iterdir()) == []
    figures = build_shards([documents], tokenizer_folder, tmp_path / "set", OPTIONS)
    assert figures["continued"]
    assert figures["seconds"] * figures["tokens_per_s"] < 0.6 * figures["tokens"]  # 60 chunks were kept
    assert contents(tmp_path / "set") == contents(tmp_path / "uninterrupted")


def test_the_same_arguments_resume_the_build(
    interrupted: Path, uninterrupted: Path, documents: Path, tokenizer_folder: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in interrupted.glob("train/*.tar")}
    assert before
    for stray in (".state.pickle.partial-1", "train/.000099.tar.partial"):  # left by a kill during a write
        (interrupted / stray).touch()
    figures = build_shards([documents], tokenizer_folder, interrupted.parent / "set", OPTIONS)
    assert figures["continued"]
    after = {path.name: path.stat().st_mtime_ns for path in (interrupted.parent / "set").glob("train/*.tar")}
    kept = [name for name in before if before[name] == after[name]]
    assert kept  # not rewritten
    assert contents(interrupted.parent / "set") == contents(uninterrupted)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"row_len": 512}, "row len"), ({"holdout": 0.2}, "holdout"), ({"dedup": False}, "dedup")],
)
def test_other_arguments_are_refused_or_restart_the_build(
    interrupted: Path, documents: Path, tokenizer_folder: Path, change: dict, name: str
) -> None:
    options = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(UserError, match=f"interrupted build with different {name}; pass the same") as caught:
        build_shards([documents], tokenizer_folder, interrupted.parent / "set", options)
    assert "\n" not in str(caught.value)
    figures = build_shards(
        [documents], tokenizer_folder, interrupted.parent / "set", dataclasses.replace(options, overwrite=True)
    )
    assert not figures["continued"]
    assert verify(interrupted.parent / "set")["problems"] == []


def test_other_inputs_are_refused(interrupted: Path, documents: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("tree")
    with pytest.raises(UserError, match="interrupted build with different input files"):
        build_shards([documents, tmp_path / "more.txt"], tokenizer_folder, interrupted.parent / "set", OPTIONS)


def test_golden_samples_are_checked_before_a_build_resumes(
    interrupted: Path, documents: Path, tokenizer_folder: Path
) -> None:
    job = json.loads((interrupted / "job.json").read_text())
    job["golden_samples"] = {text: ids[1:] for text, ids in job["golden_samples"].items()}
    (interrupted / "job.json").write_text(json.dumps(job))
    with pytest.raises(UserError, match="encodes 'The quick brown fox didn"):
        build_shards([documents], tokenizer_folder, interrupted.parent / "set", OPTIONS)


def test_a_golden_sample_that_is_not_valid_unicode_is_damage_of_the_job(
    interrupted: Path, documents: Path, tokenizer_folder: Path
) -> None:
    path = interrupted / "job.json"
    path.write_bytes(path.read_bytes().replace(b"\\ud835\\udfd8", b"\\ud035\\udfd8"))
    with pytest.raises(RunError, match=r"job\.json is missing, damaged or changed since the interruption"):
        build_shards([documents], tokenizer_folder, interrupted.parent / "set", OPTIONS)


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a lost shard": ("train/000000.tar", Path.unlink),
    "a lost index": ("train/000000.idx", Path.unlink),
    "a truncated state": ("state.pickle", lambda path: os.truncate(path, 1000)),
    "a flipped state": ("state.pickle", flip_middle),
    "a lost job": ("job.json", Path.unlink),
    "a truncated job": ("job.json", lambda path: os.truncate(path, 10)),
    "lost digests": ("digests.bin", Path.unlink),
    "truncated digests": ("digests.bin", lambda path: os.truncate(path, 16)),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_state_is_refused_or_restarts_the_build(
    partial_template: Path, uninterrupted: Path, documents: Path, tokenizer_folder: Path, tmp_path: Path, kind: str
) -> None:
    partial = shutil.copytree(partial_template, tmp_path / partial_template.name)
    name, damage = DAMAGE[kind]
    damage(partial / name)
    with pytest.raises(
        RunError, match=f"{name} is missing, damaged or changed since the interruption; pass --overwrite to restart"
    ) as caught:
        build_shards([documents], tokenizer_folder, tmp_path / "set", OPTIONS)
    assert "\n" not in str(caught.value)
    if kind in ("a lost shard", "a truncated job"):
        assert not build_shards(
            [documents], tokenizer_folder, tmp_path / "set", dataclasses.replace(OPTIONS, overwrite=True)
        )["continued"]
        assert contents(tmp_path / "set") == contents(uninterrupted)


def test_a_second_build_of_the_same_folder_is_refused(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    from fusiontree.files import resumable_folder

    with resumable_folder(tmp_path / "set", False, "manifest.json", ["state.pickle"]):
        message = cli(
            *("data", "build", "--input", corpus, "--tokenizer", tokenizer_folder, "--output", tmp_path / "set"), code=2
        ).stderr
    assert message.startswith("fusiontree: error: another process is creating ")
    assert message.count("\n") == 1


# --- deduplication ---------------------------------------------------------------------------------------------------


def test_the_first_of_several_equal_documents_is_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = ["tree", "gate", "tree", "tree ", "gate", "scan"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    figures = build_shards(
        [tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "set", BuildOptions(row_len=64, holdout=0, dedup=True)
    )
    assert (figures["documents"], figures["duplicates"]) == (4, 2)
    dataset = Dataset(tmp_path / "set")
    names = [span.id for row in range(dataset.num_rows) for span in dataset.spans(row)]
    assert sorted(names) == ["in.jsonl:1", "in.jsonl:2", "in.jsonl:4", "in.jsonl:6"]


def test_seen_texts_behave_like_a_set(tmp_path: Path) -> None:
    draw = random.Random(1)
    seen, truth = SeenTexts(tmp_path / "digests", 0), set()
    saved: tuple[int, set[bytes]] = (0, set())
    for call in range(200):
        digests = [digest(str(draw.randrange(3000))) for _ in range(draw.randrange(40))]
        expected = [d not in truth and d not in digests[:i] for i, d in enumerate(digests)]
        truth |= set(digests)
        assert seen.add(np.array(digests, "S16")).tolist() == expected
        if call == 120:
            seen.save()
            saved = seen.count, set(truth)
    assert seen.count == len(truth)
    assert sum(run.nbytes for run in seen._runs) == 16 * len(truth)  # bytes of memory per document
    again = SeenTexts(tmp_path / "digests", saved[0])
    assert not again.add(np.array(sorted(saved[1]), "S16")).any()
    new = sorted(truth - saved[1])
    assert new
    assert again.add(np.array(new, "S16")).all()
