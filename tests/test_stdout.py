"""Standard output has a command's result alone, whatever libraries print on import, later or from C++."""

import ast
import json
import os
import subprocess
import sys

import pytest
from test_imports import MODULES

PROGRAMS = ("fusiontree.zero.settings", "launcher.allocation")  # their own, with a result on standard output

# runs the command line as the installed program does, with libraries that print in every way
NOISY = """
import logging, os, sys, types, warnings

def noise():
    print("NOISE by print")
    sys.__stdout__.write("NOISE by write")
    os.write(1, b"NOISE from C++\\n")
    warnings.warn("NOISE by warnings")
    logging.getLogger("library").warning("NOISE by logging")

def generate_text(folder, prompt, tokens, sampling, on_text):
    noise()
    for part in ("one", " two", " three"):
        if on_text:
            on_text(part)
        noise()
    return {"text": "one two three"}

def module(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)

def evaluate(folder, tasks, options):
    noise()
    return {"perplexity": {"loss": 1.5}}

module("fusiontree.inference.generate", generate_text=generate_text, generate_texts=None, read_prompts=None)
module("fusiontree.inference.sampling", Sampling=lambda *_: None)
module("fusiontree.evaluate.tasks", evaluate=evaluate)
module("launcher.status", status=lambda run: noise() or {"step": 3})
module("data_tools.verify", verify=lambda *_, **__: noise() or {"shards": 1, "problems": []})
module("fusiontree.training.trainer", train=lambda *_: noise() or {"steps": 4})
from fusiontree.__main__ import run
run()
"""


def noisy(*words: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a command beside noisy libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", NOISY, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for way in ("by print", "by write", "from C++", "by warnings", "by logging"):
        assert f"NOISE {way}" in (done.stderr or done.stdout)
    return done


def test_generate_prints_the_text_alone() -> None:
    assert noisy("generate", "out", "prompt").stdout == "one two three\n"


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("generate out prompt --json", {"text": "one two three"}),
        ("eval out --tasks perplexity --data d --json", {"perplexity": {"loss": 1.5}}),
        ("status run --json", {"step": 3}),
        ("data verify folder --json", {"shards": 1, "problems": []}),
        ("train tiny --json", {"steps": 4}),
    ],
)
def test_json_is_all_of_standard_output(command: str, result: dict) -> None:
    assert json.loads(noisy(*command.split()).stdout) == result


def test_a_warning_between_two_pieces_of_text_comes_after_the_text() -> None:
    """A terminal shows both streams."""
    shown = noisy("generate", "out", "prompt", stderr=subprocess.STDOUT).stdout
    text, _, rest = shown.replace("NOISE from C++\n", "").replace("NOISE by write", "").partition("NOISE by print")
    assert text == "one two three"
    assert "NOISE by warnings" in rest


@pytest.mark.parametrize("module", [name for name in MODULES if name not in PROGRAMS])
def test_results_go_through_the_reserved_stream(module: str) -> None:
    """A bare print would end on standard error in the installed program."""
    calls = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)]
    bare = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "print"
        and not any(k.arg == "file" for k in call.keywords)
    ]
    assert bare == [] or module == "launcher.allocation"  # a program of its own
