"""Errors are one line with the problem, its place and the remedy; exit code 2 for the user's, 1 for the run's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import cli, in_process, settings

from data_tools.build import build_shards
from data_tools.options import BuildOptions
from data_tools.tokenizers import train_tokenizer
from fusiontree.errors import UserError
from fusiontree.files import copy_files, staged_folder


def error_line(*arguments: object, code: int = 2, fork: bool = True) -> str:
    """Run a command that fails in a process of its own and return its error line."""
    return only_error(cli(*arguments, code=code, fork=fork))


def refusal(*arguments: object, code: int = 2) -> str:
    """Return the same of a command that starts no training, run in this process."""
    return only_error(in_process(*arguments, code=code))


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("fusiontree: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and export a run; the export is `run/export`."""
    output = tmp_path_factory.mktemp("runs")
    cli("train", "tiny", *settings(shards, output, name="run"))
    cli("export", output / "run", output / "run" / "export")
    return output / "run"


def test_missing_or_empty_inputs(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (
        ["data", "tokenizer", "--vocab-size", 300],
        ["data", "build", "--tokenizer", tokenizer_folder],
    ):
        missing = refusal(*command, "--input", tmp_path / "nowhere", "--output", tmp_path / "out")
        assert "nowhere does not exist" in missing
        assert "no documents" in refusal(*command, "--input", tmp_path / "empty", "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_utf8_is_skipped_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("tree gate branch")
    (tmp_path / "in" / "also.txt").write_text("tree gate branch")
    (tmp_path / "in" / "bad.txt").write_bytes(b"tree \xff gate")
    command = [
        "data",
        "build",
        "--input",
        tmp_path / "in",
        "--tokenizer",
        tokenizer_folder,
        "--output",
        tmp_path / "out",
    ]
    figures = json.loads(in_process(*command, "--json").stdout)
    assert figures["documents"] == 2
    assert figures["skipped"] == [{"path": "bad.txt", "reason": "not UTF-8 (line 1, byte 5)"}]
    assert "bad.txt: not UTF-8 (line 1, byte 5)" in in_process(*command, "--overwrite").stdout


@pytest.mark.slow
def test_undecodable_names_are_printed_escaped(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # read when an interpreter starts, so no process is a fork
    source = tmp_path / os.fsdecode(b"caf\xe9")
    source.mkdir()
    (source / os.fsdecode(b"caf\xe9.txt")).touch()
    (source / "keys.jsonl").write_bytes(b'{"\\ud800": 1}\n{"text": "tree"}')
    command = ["data", "build", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out", "--input"]
    output = cli(*command, source, fork=False).stdout
    assert "caf\\udce9.txt: empty" in output
    assert "(keys: \\ud800)" in output
    assert "caf\\udce9.txt" in error_line(*command, source / os.fsdecode(b"caf\xe9.txt"), "--overwrite", fork=False)


def test_an_existing_output_is_rejected_without_overwrite(
    corpus: Path, tokenizer_folder: Path, shards: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for command in (
        ["data", "tokenizer", "--input", corpus, "--vocab-size", 300, "--output"],
        ["data", "build", "--input", corpus, "--tokenizer", tokenizer_folder, "--output"],
        ["export", run],
    ):
        assert "has other contents" in refusal(*command, tmp_path, "--overwrite")
    foreign = settings(shards, tmp_path.parent, name=tmp_path.name)
    assert "has other contents" in error_line("train", "tiny", *foreign)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert "name another or pass --overwrite" in refusal("export", run, run / "export")
    assert "has other contents" in refusal("export", run, run, "--overwrite")
    assert "must not contain each other" in error_line(
        "train", "tiny", *settings(shards, shards.parent, name=shards.name)
    )


def test_links_in_a_datasets_tokenizer_are_not_followed(shards: Path, tmp_path: Path) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    (tmp_path / "secret").write_text("precious")
    shutil.copytree(shards, data)
    (data / "tokenizer" / "more").symlink_to(tmp_path / "secret")
    assert f"{data}/tokenizer/more is a link" in error_line("train", "tiny", *settings(data, runs))
    assert not runs.exists()


def test_files_are_copied_without_following_links(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "file").write_text("new")
    (target / "inner").mkdir(parents=True)
    (target / "other").write_text("stays")
    (tmp_path / "elsewhere").write_text("precious")
    (target / "inner" / "file").symlink_to(tmp_path / "elsewhere")
    copy_files(source, target)
    assert (target / "inner" / "file").read_text() == "new"
    assert (target / "other").exists()
    assert (tmp_path / "elsewhere").read_text() == "precious"
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="is a link or no file; replace it by the file itself"):
            copy_files(path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_a_corpus_of_one_document_has_no_held_out_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "one.txt").write_text("tree gate branch scan. " * 400)
    build_shards([tmp_path / "one.txt"], tokenizer_folder, tmp_path / "shards", BuildOptions(row_len=512))
    assert "disable validation: validation.every=0" in error_line(
        "train", "tiny", *settings(tmp_path / "shards", tmp_path / "runs")
    )
    cli("train", "tiny", *settings(tmp_path / "shards", tmp_path / "runs", validation__every=0))


def test_a_folder_without_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    assert "has no tokenizer.json" in refusal(
        "data", "build", "--input", corpus, "--tokenizer", tmp_path, "--output", tmp_path / "out"
    )


@pytest.mark.parametrize("command", [["train", "tiny"], ["launch", "tiny", "--local", 2]])
def test_an_invalid_run_starts_nothing(command: list, shards: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"data__path": tmp_path / "nowhere"}, "no manifest.json there"),
        ({"model__vocab_size": 256}, "more than model.vocab_size 256"),
        ({"model__widow": 3}, "did you mean 'model.window'?"),
        ({"batch__tokens": 1000}, "batch.tokens 1000 is not a multiple"),
        ({"schedule__warmup_steps": 8}, "schedule: warmup_steps 8 is not below steps 8"),
        ({"deepspeed": "zero9"}, "deepspeed 'zero9'"),
        ({"optimizer__lr": "fast"}, "optimizer.lr"),
    ):
        assert words in error_line(*command, *settings(shards, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()
    assert "did you mean the preset 'tiny'" in error_line(command[0], "tiney", *command[2:])


def test_a_row_length_that_the_shards_do_not_support(shards: Path, tmp_path: Path) -> None:
    line = error_line("train", "tiny", *settings(shards, tmp_path, data__seq_len=96, batch__tokens=960))
    assert "96" in line
    assert "512" in line


def test_a_batch_that_does_not_divide_among_the_ranks(shards: Path, tmp_path: Path) -> None:
    line = error_line("launch", "tiny", "--local", 3, *settings(shards, tmp_path))
    assert "batch.tokens 1024 does not divide among 3 ranks" in line
    assert "nearest rank counts for this batch: 2 or 4" in line


def test_an_unknown_kernel(shards: Path, tmp_path: Path) -> None:
    line = error_line("train", "tiny", *settings(shards, tmp_path, kernels__scan="warp"))
    assert "kernels.scan 'warp' is unknown; choose auto or one of mamba_ssm, reference" in line


def test_missing_or_damaged_checkpoints(run: Path, tmp_path: Path) -> None:
    assert "no run or checkpoint at" in refusal("export", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint" in refusal("export", tmp_path / "empty", tmp_path / "out")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for states in (copy / "checkpoints").glob("step-*/mp_rank_00_model_states.pt"):
        states.write_bytes(states.read_bytes()[:-1])
    assert "no valid checkpoint under" in refusal("export", copy, tmp_path / "out", code=1)
    assert "step-8 is damaged: " in refusal("export", copy / "checkpoints" / "step-8", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_damaged_or_missing_shards(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar = next((copy / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    tar.write_bytes(content)
    assert tar.name in cli("data", "verify", copy, code=1).stdout
    damaged = settings(copy, tmp_path / "runs", schedule__steps=30, data__max_bad_rows=0)
    assert tar.name in error_line("launch", "tiny", "--local", 2, *damaged, code=1)
    tar.unlink()
    assert "train" in error_line("train", "tiny", *settings(copy, tmp_path / "runs"), code=2)


def test_a_folder_that_is_no_export_and_an_invalid_prompt(run: Path, tmp_path: Path) -> None:
    assert "is not an exported model" in refusal("generate", tmp_path, "tree")
    assert "is not an exported model" in refusal("eval", tmp_path, "--tasks", "perplexity", "--data", tmp_path)
    assert "the prompt is empty" in refusal("generate", run / "export", "")
    assert "--temperature is -1" in refusal("generate", run / "export", "tree", "--temperature", -1)
    assert "--max-new-tokens is -3" in refusal("generate", run / "export", "tree", "--max-new-tokens", -3)
    undecodable = b"\xff".decode(errors="surrogateescape")
    assert "the prompt is not valid UTF-8" in refusal("generate", run / "export", undecodable)


def test_a_damaged_export(run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (
        ("config.json", "is a damaged export"),
        ("model.safetensors", "model.safetensors is damaged (its size differs from that of its tensors)"),
        ("tokenizer.json", "is a damaged export"),
    ):
        copy = tmp_path / name
        shutil.copytree(run / "export", copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:-20])
        assert words in refusal("generate", copy, "tree", code=1)
    options = ["eval", run / "export", "--tasks", "perplexity", "--data", shards]
    assert "--limit is 0" in refusal(*options, "--limit", 0)
    monkeypatch.setenv("FUSIONTREE_SCAN", "warp")
    assert "kernels.scan 'warp' is unknown" in refusal(*options)


def test_shards_of_another_tokenizer(run: Path, corpus: Path, shards: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], 280, tmp_path / "other")
    build_shards([corpus], tmp_path / "other", tmp_path / "shards", BuildOptions(row_len=512, holdout=0.1))
    line = refusal("eval", run / "export", "--tasks", "perplexity", "--data", tmp_path / "shards")
    assert "is not the one that made the shards" in line
    assert "--tasks 'magic' is unknown" in refusal("eval", run / "export", "--tasks", "magic", "--data", shards)
    line = error_line("train", "tiny", *settings(tmp_path / "shards", run.parent, name="run"))
    assert "data (shards other than those of" in line
    copy = tmp_path / "swapped"
    shutil.copytree(shards, copy)
    shutil.copyfile(tmp_path / "other" / "tokenizer.json", copy / "tokenizer" / "tokenizer.json")
    assert "tokenizer" in error_line("train", "tiny", *settings(copy, tmp_path / "runs"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a full disk needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_no_incomplete_output(
    small_disk: Path, corpus: Path, tokenizer_folder: Path, shards: Path, run: Path
) -> None:
    command = ["data", "build", "--input", corpus, "--tokenizer", tokenizer_folder, "--output", small_disk / "out"]
    assert "No space left on device" in error_line(*command, "--row-len", 1 << 19, code=1)
    assert "free disk space" in error_line(
        "launch", "tiny", "--local", 2, *settings(shards, small_disk, name="r"), code=1
    )
    assert not list((small_disk / "r" / "checkpoints").glob("step-*"))
    shutil.rmtree(small_disk / "r")
    assert "space" in error_line("export", run, small_disk / "export", code=1).lower()
    assert not list(small_disk.iterdir())


def restore_ctrl_c() -> None:
    """Restore SIGINT, which a suite in the background ignores and its children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(
    arguments: list, folder: Path, started: str, by: int = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Run a command and send it Ctrl-C, or `by`, once a path in `folder` matches the pattern `started`."""
    command = [sys.executable, "-m", "fusiontree", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_ctrl_c,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob(started)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, by)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


MOMENTS = {
    "while the interpreter of a worker starts": """
if "--multiprocessing-fork" in sys.orig_argv:
    press()
""",
    "when workers have finished three of the files": """
left = 12  # opened by workers, and eight may wait
def count(event, arguments):
    global left
    if event == "open" and str(arguments[0]).endswith(".txt"):
        left -= 1
        if not left:
            press()
sys.addaudithook(count)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_in_a_build(moment: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """One of the build's processes sends it at that moment, independent of the machine's speed."""
    site, many = tmp_path / "site", tmp_path / "many"
    site.mkdir()
    many.mkdir()
    (site / "sitecustomize.py").write_text(f"""
import os, signal, sys
mark = {str(site / "pressed")!r}
def press():
    try:
        open(mark, "x").close()
    except FileExistsError:
        return  # the other worker has sent it
    os.killpg(0, signal.SIGINT)
{MOMENTS[moment]}""")
    for number in range(16):
        (many / f"{number}.txt").write_text("tree gate\n" * (1 << 17))
    command = ["data", "build", "--input", many, "--tokenizer", tokenizer_folder, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "fusiontree", *map(str, command), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
        preexec_fn=restore_ctrl_c,
    )
    assert (site / "pressed").exists()
    assert done.returncode == 1, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"many", "site"}


def test_ctrl_c_in_training(shards: Path, tmp_path: Path) -> None:
    train = ["launch", "tiny", "--local", 2, *settings(shards, tmp_path, name="run", schedule__steps=100_000)]
    done = interrupted(train, tmp_path, "run/metrics.jsonl")
    assert done.returncode == 1, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_export_leaves_nothing_and_the_next_one_removes_the_rest_of_a_killed_one(
    run: Path, tmp_path: Path
) -> None:
    export = ["export", run, tmp_path / "out"]
    done = interrupted(export, tmp_path, ".out.partial*/*", by=signal.SIGTERM)
    assert (done.returncode, done.stderr.count("interrupted")) == (1, 1), done.stderr
    assert not list(tmp_path.iterdir())
    interrupted(export, tmp_path, ".out.partial*/*", by=signal.SIGKILL)
    (rest,) = tmp_path.glob(".out.partial*")
    (rest / "stray").touch()
    cli(*export)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stray").exists()


def test_an_interrupted_write_removes_its_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").touch()

    def interrupt() -> None:
        with staged_folder(tmp_path / "kept", overwrite=True, marker="old") as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "old"]


def test_every_sources_golden_samples_are_encoded_again(shards: Path, tmp_path: Path) -> None:
    other = shutil.copytree(shards, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    golden = manifest["tokenizer"]["golden"]
    golden[next(iter(golden))].append(5)
    (other / "manifest.json").write_text(json.dumps(manifest))
    sources = ["data.path=null", f"data.sources.a.path={shards}", f"data.sources.b.path={other}"]
    line = error_line("train", "tiny", *settings(shards, tmp_path, name="run"), *sources)
    assert f"tokenizer {other / 'tokenizer'} encodes" in line
    assert "differently than when the shards were made" in line
