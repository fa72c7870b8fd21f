"""Command line: calls, output and exit codes."""

import argparse
import dataclasses
import errno
import json
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import write_manifest

from data_tools.options import BuildOptions, InputOptions
from fusiontree import cli
from fusiontree.cli.printing import show
from fusiontree.errors import RunError, UserError
from fusiontree.evaluate.options import EvalOptions
from fusiontree.export.options import ExportOptions

COMMANDS = [
    *("data tokenizer", "data build", "data verify", "data inspect", "data plan", "data at"),
    *("train", "launch", "export", "generate", "eval", "doctor", "demo", "report"),
    *("bench loader", "bench overhead", "bench export"),
]


@pytest.fixture
def stand_in(monkeypatch):
    """Replace a function that the command line calls, and record its calls."""
    monkeypatch.delenv("FUSIONTREE_LAUNCH", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def install(module: str, function: str, answer):
        calls = []

        def call(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        stand = types.ModuleType(module)
        setattr(stand, function, call)
        monkeypatch.setitem(sys.modules, module, stand)
        return calls

    return install


def words(command: str, *more: str) -> list[str]:
    return [*command.split(), *more]


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help_shows_a_one_line_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words(command, "--help"))
    assert caught.value.code == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Example: fusiontree {command or 'demo'}")


def test_help_imports_no_heavy_package():
    code = (
        "import sys, contextlib\nfrom fusiontree.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print({'torch', 'deepspeed', 'pydantic', 'yaml', 'numpy', 'rich', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_python_m_fusiontree():
    result = subprocess.run([sys.executable, "-m", "fusiontree", "train", "tinny"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("fusiontree: error: configuration tinny is neither a file nor a preset")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong input"), 2, "fusiontree: error: wrong input\n"),
        (RunError("damaged"), 1, "fusiontree: error: damaged\n"),
        (KeyboardInterrupt(), 1, "fusiontree: interrupted; no partial output is left under its final name\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "fusiontree: error: a/b: No space left on device\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "fusiontree: error: out: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "fusiontree: error: c: Permission denied\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error, code, line, stand_in, capsys):
    stand_in("fusiontree.export.exporter", "export", error)
    assert cli.main(["export", "run", "out"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


@pytest.mark.parametrize("error", [KeyError("ours"), ValueError("ours"), OSError(errno.ECHILD, "ours")])
def test_bugs_keep_their_traceback(error, stand_in):
    stand_in("fusiontree.export.exporter", "export", error)
    with pytest.raises(type(error), match="ours"):
        cli.main(["export", "run", "out"])


def test_errors_of_other_ranks_name_the_rank(stand_in, monkeypatch, capsys):
    stand_in("fusiontree.training.trainer", "train", RunError("damaged"))
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == "fusiontree: error: rank 3: damaged\n"


def test_a_launched_rank_reports_its_error_to_the_launcher(stand_in, monkeypatch, tmp_path, capsys):
    stand_in("fusiontree.training.trainer", "train", UserError("wrong input"))
    monkeypatch.setattr("fusiontree.cli.training.join_launcher", lambda: None)
    monkeypatch.setenv("FUSIONTREE_LAUNCH", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "tiny"]) == 2
    assert capsys.readouterr().err == ""
    report = json.loads((tmp_path / "rank-1.json").read_text())
    assert (report["rank"], report["code"], report["message"]) == (1, 2, "wrong input")


def test_a_launched_rank_reports_a_bug_as_a_failure(stand_in, monkeypatch, tmp_path):
    stand_in("fusiontree.training.trainer", "train", KeyError("ours"))
    monkeypatch.setattr("fusiontree.cli.training.join_launcher", lambda: None)
    monkeypatch.setenv("FUSIONTREE_LAUNCH", str(tmp_path))
    with pytest.raises(KeyError):
        cli.main(["train", "tiny"])
    report = json.loads((tmp_path / "rank-0.json").read_text())
    assert (report["code"], report["message"]) == (1, None)


def test_data_tokenizer_passes_its_arguments(stand_in, capsys):
    calls = stand_in("data_tools.tokenizers", "train_tokenizer", {"vocab_size": 8192, "seconds": 1.5})
    argv = "data tokenizer --input a b --vocab-size 8192 --output t --include *.py --exclude x* --exclude y*"
    assert cli.main(argv.split()) == 0
    options = InputOptions(include=("*.py",), exclude=("x*", "y*"))
    assert calls == [((["a", "b"], 8192, Path("t"), options, False), {})]
    assert capsys.readouterr().out == "vocab size  8,192\nseconds     1.5 s\n"


def test_data_build_passes_its_arguments(stand_in, capsys):
    calls = stand_in("data_tools.build", "build_shards", {"tokens": 5})
    argv = ["data", "build", "--input", "a", "--tokenizer", "t", "--output", "d", "--workers", "2", "--overwrite"]
    argv += [
        "--dedup",
        "--eos",
        "<e>",
        "--text-key",
        "body",
        "--doc-separator",
        "\\n--\\n",
        "--min-chars",
        "3",
        "--json",
    ]
    assert cli.main(argv) == 0
    options = BuildOptions(
        row_len=32768,
        holdout=0.02,
        holdout_from="spread",
        dedup=True,
        eos="<e>",
        encoder="auto",
        input=InputOptions((), (), "body", "\n--\n", 3, None),
        workers=2,
        overwrite=True,
    )
    assert calls == [((["a"], Path("t"), Path("d"), options), {})]
    assert json.loads(capsys.readouterr().out) == {"tokens": 5}


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["train-0: row 3 is damaged"], 1)])
def test_data_verify_exits_with_1_for_problems(problems, code, stand_in, capsys):
    stand_in("data_tools.verify", "verify", {"rows": 12, "problems": problems})
    assert cli.main(["data", "verify", "d"]) == code
    assert capsys.readouterr().out == f"rows      12\nproblems  {problems[0] if problems else 'none'}\n"


def test_data_inspect_describes_a_dataset_or_shows_a_row(monkeypatch, capsys):
    stand = types.ModuleType("data_tools.inspection")
    stand.describe = lambda folder: {"folder": folder}
    stand.show_row = lambda folder, row, split, tokenizer: {"row": row, "split": split, "tokenizer": tokenizer}
    monkeypatch.setitem(sys.modules, "data_tools.inspection", stand)
    assert cli.main(["data", "inspect", "d"]) == 0
    assert capsys.readouterr().out == "folder  d\n"
    assert cli.main(["data", "inspect", "d", "--row", "0", "--split", "validation", "--tokenizer", "t", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"row": 0, "split": "validation", "tokenizer": "t"}


@pytest.mark.parametrize("argv", ["train tiny seed=3 name=x --json", "train tiny --json seed=3 name=x"])
def test_train_loads_the_configuration_and_prints_the_summary(argv, stand_in, capsys):
    calls = stand_in("fusiontree.training.trainer", "train", {"steps": 200})
    assert cli.main(argv.split()) == 0
    (((config, allowed, trust), _),) = calls
    assert not allowed
    assert not trust
    assert (config.seed, config.name) == (3, "x")
    assert json.loads(capsys.readouterr().out) == {"steps": 200}


def test_only_rank_0_prints_the_summary(stand_in, monkeypatch, capsys):
    stand_in("fusiontree.training.trainer", "train", {"steps": 200})
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "tiny"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argv", ["train tiny --bogus", "doctor --ranks 2 --x=3", "data verify a b=c"])
def test_unrecognized_arguments_are_a_usage_error(argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv.split())
    assert caught.value.code == 2


def test_a_full_disk_error_without_a_path_names_the_runs_folder(stand_in, capsys):
    stand_in("fusiontree.training.trainer", "train", OSError(errno.ENOSPC, "No space left on device"))
    assert cli.main(["train", "tiny", "output=there", "name=mine"]) == 1
    assert capsys.readouterr().err == "fusiontree: error: there/mine: No space left on device\n"


def test_export_passes_its_arguments(stand_in, capsys):
    calls = stand_in("fusiontree.export.exporter", "export", {"model_bytes": 3 * 2**20, "proved": True})
    assert cli.main(["export", "runs/a", "out", "--dtype", "bf16", "--max-shard-size", "1GB", "--prune", "2"]) == 0
    options = {"dtype": "bf16", "overwrite": False, "max_shard_size": "1GB", "trust": False, "prune": "2"}
    options |= {"prune_heads": 0, "data": None, "limit": None}
    assert calls == [((Path("runs/a"), Path("out"), ExportOptions(**options)), {})]
    assert capsys.readouterr().out == "model   3.00 MiB\nproved  yes\n"


def test_eval_prints_records_as_tables(stand_in, capsys):
    speed = {"tokens_per_s": 12.0, "first_token": {"median_seconds": 0.5}, "cache_bytes": 2**20}
    tasks = {
        "passkey": {"chance": 0.1, "cells": [{"length": 64, "accuracy": 1.0}, {"length": 1024, "accuracy": 0.25}]},
        "throughput": {"by_length": {"64 tokens": speed, "9 tokens": {"problem": "too large"}}},
    }
    stand_in("fusiontree.evaluate.tasks", "evaluate", tasks)
    assert cli.main(["eval", "out", "--tasks", "passkey", "throughput", "--data", "d"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "passkey",
        "  chance  0.1",
        "",
        "  cells  length  accuracy",
        "  1          64         1",
        "  2       1,024      0.25",
        "",
        "throughput",
        "",
        "  by length  tokens per s  first token median (s)     cache    problem",
        "  64 tokens            12                     0.5  1.00 MiB          -",
        "  9 tokens              -                       -         -  too large",
        "",
    ]


def test_a_group_passes_its_unit_on_to_its_figures(capsys):
    show({"memory_bytes": {"after_5_batches": 3 * 2**20}, "steps": {"2000": {"tokens": 5}}}, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "memory",
        "  after 5 batches  3.00 MiB",
        "steps",
        "  2000",
        "    tokens         5",
    ]


def test_tables_are_not_wrapped_without_a_terminal(stand_in, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    problem = "too [bold]large :smile: " * 20 + "."
    figures = {"throughput": {"by_length": {"9 tokens": {"problem": problem}}}}
    stand_in("fusiontree.evaluate.tasks", "evaluate", figures)
    assert cli.main(["eval", "out", "--tasks", "throughput", "--data", "d"]) == 0
    assert capsys.readouterr().out.splitlines()[3] == f"  9 tokens   {problem}"


def test_generate_streams_its_text(monkeypatch, capsys):
    def generate_text(folder, prompt, max_new_tokens, sampling, on_text):
        seen.update(dataclasses.asdict(sampling), folder=folder, prompt=prompt, max_new_tokens=max_new_tokens)
        if on_text:
            on_text("def ")
            on_text("main")
        return {"text": "def main"}

    seen: dict = {}
    stand = types.ModuleType("fusiontree.inference.generate")
    stand.generate_text = generate_text
    stand.generate_texts = stand.read_prompts = None
    monkeypatch.setitem(sys.modules, "fusiontree.inference.generate", stand)
    assert cli.main(["generate", "out", "a prompt", "--top-k", "5", "--max-new-tokens", "7", "--seed", "9"]) == 0
    assert capsys.readouterr().out == "def main\n"
    assert (seen["folder"], seen["prompt"], seen["top_k"], seen["max_new_tokens"]) == (Path("out"), "a prompt", 5, 7)
    assert (seen["seed"], seen["top_p"], seen["min_p"], seen["repetition_penalty"]) == (9, 1.0, 0.0, 1.0)
    assert cli.main(["generate", "out", "p", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "def main"}


def test_eval_passes_its_arguments(stand_in, capsys):
    calls = stand_in("fusiontree.evaluate.tasks", "evaluate", {"perplexity": {"loss": 2.5, "tokens": 4096}})
    words = ["--tasks", "perplexity,passkey", "recall", "--data", "d", "--limit", "4", "--lengths", "64,128"]
    assert cli.main(["eval", "out", *words]) == 0
    options = {"lengths": (64, 128), "seq_len": None, "limit": 4, "samples": 5, "output": None, "overwrite": False}
    assert calls == [((Path("out"), ["perplexity", "passkey", "recall"], EvalOptions("d", **options)), {})]
    assert capsys.readouterr().out == "perplexity\n  loss    2.5 nats per token\n  tokens  4,096\n\n"


def test_demo_passes_its_folder_and_exit_code(stand_in):
    calls = stand_in("fusiontree.cli.demo", "run_demo", 1)
    assert cli.main(["demo", "--root", "here"]) == 1
    assert calls == [((Path("here"),), {})]


@pytest.mark.slow
def test_doctor_reports_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["python"] == sys.version.split()[0]
    assert set(report["kernels"]) == {"scan", "convolution", "attention", "prefill", "decode", "loss", "pointwise"}
    assert report["machine"]["memory_bytes"] > 2**28


def test_doctor_rejects_an_impossible_run(tmp_path, capsys):
    write_manifest(tmp_path, 9000)
    argv = ["doctor", "tiny", "--json", "--ranks", "3", f"data.path={tmp_path}", "kernels.scan=warp"]
    assert cli.main([*argv, "deepspeed=zero9"]) == 1
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    assert "does not divide among 3 ranks" in problems
    assert "its tokenizer has 9000 tokens, more than model.vocab_size 8192" in problems
    assert "kernels.scan 'warp' is unknown" in problems
    assert "deepspeed 'zero9' is neither" in problems


@pytest.mark.parametrize("count", ["--ranks=0", "--ranks=-1", "--nodes=0"])
def test_doctor_rejects_counts_below_one(count, capsys):
    assert cli.main(["doctor", "tiny", count]) == 2
    assert capsys.readouterr().err == f"fusiontree: error: {count.replace('=', ' is ')}; it must be at least 1\n"


def test_doctor_finds_a_run_too_large_for_the_machine(tmp_path, capsys, monkeypatch):
    write_manifest(tmp_path, 8192)
    monkeypatch.setattr("fusiontree.doctor.diagnose._memory", lambda: 2**30)
    assert cli.main(["doctor", "tiny", "--json", f"data.path={tmp_path}"]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", "tiny", "--json", "--ranks", "4", f"data.path={tmp_path}"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert re.fullmatch(r"4 ranks on this machine need about \d\.\d GiB, but 1\.0 GiB is available; lower .*", problem)


@pytest.mark.parametrize(
    ("stage", "ranks", "bytes_per_parameter"), [(0, 4, 16), (1, 4, 11), (2, 4, 8), (3, 4, 5), (3, 1, 20)]
)
def test_zero_partitions_moments_then_gradients_then_weights(stage, ranks, bytes_per_parameter):
    from fusiontree.doctor.memory import state_bytes

    assert state_bytes(1000, {"stage": stage}, ranks) == 1000 * bytes_per_parameter


def test_doctor_shows_the_error_of_a_broken_package(monkeypatch):
    from fusiontree.doctor import diagnose

    def broken(module):
        raise RuntimeError("libcuda.so\nis missing")

    monkeypatch.setattr(diagnose.importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(diagnose.importlib, "import_module", broken)
    assert diagnose._try_import("flash-attn", "flash_attn") == (
        "1.2, broken: RuntimeError: libcuda.so is missing",
        False,
    )
    problems: list[str] = []
    diagnose._versions(problems)
    assert problems[0].startswith("torch is 1.2, broken: RuntimeError: libcuda.so is missing; install it")


def test_a_closed_pipe_causes_no_traceback(tmp_path):
    write_manifest(tmp_path, 8192)
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "fusiontree", "launch", "tiny", "--local", "1", "--dry-run", f"data.path={tmp_path}"]
    result = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def leaf_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command by its words."""
    found = {}

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in commands:
            for name, child in action.choices.items():
                walk(child, (*words, name))
        if not commands:
            found[" ".join(words)] = parser

    walk(cli._parser(), ())
    return found


def example(action: argparse.Action, number: int) -> str:
    """Return a value that `action` accepts."""
    if action.dest == "overrides":
        return f"optimizer.lr={number}"
    return str(next(iter(action.choices))) if action.choices else str(number)


@pytest.mark.parametrize("command", leaf_parsers())
def test_options_and_words_may_come_in_any_order(command: str) -> None:
    """The order among positional words stays, except that overrides may also precede CONFIG."""
    leaf = leaf_parsers()[command]
    excluded = [action for group in leaf._mutually_exclusive_groups for action in group._group_actions[1:]]
    actions = [action for action in leaf._actions if action not in excluded]
    options: list[list[str]] = []
    open_ended: list[list[str]] = []  # last here, because they take the words after them
    words: list[str] = []
    for number, action in enumerate(actions, 1):
        values = [example(action, number)] * (0 if action.nargs == 0 else 2 if action.nargs in ("+", "*") else 1)
        if not action.option_strings:
            words += values
        elif "--help" not in action.option_strings:
            (open_ended if action.nargs in ("+", "?") else options).append([action.option_strings[-1], *values])
    rest = [text for option in open_ended for text in option]
    plain = [text for option in options for text in option]
    parser = cli._parser()
    expected = parser.parse_args([*command.split(), *plain, *rest, "--", *words])
    draw = random.Random(0)
    for _ in range(30):
        parts = draw.sample(options, len(options))
        for place, word in sorted(zip((draw.randint(0, len(parts)) for _ in words), words, strict=True), reverse=True):
            parts.insert(place, [word])
        order = iter(words)  # the places are random, the order of the words is not
        argv = [text for part in parts for text in ([next(order)] if len(part) == 1 and part[0] in words else part)]
        assert parser.parse_args([*command.split(), *argv, *rest]) == expected, argv


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("generate OUT --top-p 0.9 PROMPT", {"folder": Path("OUT"), "prompt": "PROMPT", "top_p": 0.9}),
        ("generate --top-p=0.9 OUT --temperature -1 PROMPT", {"temperature": -1.0, "prompt": "PROMPT"}),
        ("generate --max-new 3 OUT -- --help", {"max_new_tokens": 3, "prompt": "--help"}),
        ("eval --data d --tasks perplexity passkey OUT", {"tasks": ["perplexity", "passkey"], "folder": Path("OUT")}),
        ("report a --out page.html b", {"runs": [Path("a"), Path("b")]}),
        ("train name=a tiny --allow-changed x name=b", {"config": "tiny", "overrides": ["name=a", "name=b"]}),
        ("bench decode --preset tiny --batch 1 2 model.window=8", {"batch": [1, 2], "overrides": ["model.window=8"]}),
        ("bench overhead --json 125m", {"config": "125m", "json": True}),
    ],
)
def test_words_after_an_option_go_where_they_belong(argv: str, values: dict[str, object]) -> None:
    found = vars(cli._parser().parse_args(argv.split()))
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize("argv", ["generate OUT PROMPT MORE", "generate OUT --top-p", "eval OUT --bogus 3 --data d"])
def test_words_that_no_argument_takes_are_a_usage_error(argv: str) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(argv.split())
