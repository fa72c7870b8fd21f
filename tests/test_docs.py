"""Documentation: every command, option, configuration key, path and link in it exists."""

import argparse
import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_manifest

from fusiontree import cli
from fusiontree.config import is_key, load_config, preset_names
from fusiontree.config.keys import SECTIONS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for name in ("fusiontree", "launcher", "data_tools") for path in sorted((ROOT / name).rglob("*.py"))]
PATHS = r"(fusiontree|launcher|data_tools|tests|docs|ds_configs|findings)/[\w./-]*"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "bash", "console", "sh", "shell")
COMMAND = re.compile(r"(?:^|[ /])fusiontree ([a-z].*?)(?: *(?:#|&&|\)|;).*)?$")
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")
OTHER_PROGRAMS = {"--signal", "--export", "--nv"}  # options of sbatch and apptainer that the pages mention alone


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the page's code blocks in one of `languages`."""
    return [text for name, text in FENCE.findall(page.read_text()) if name in languages]


def spans(page: Path) -> list[str]:
    """Return the page's inline code, each on one line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))]


def commands(page: Path) -> list[str]:
    """Return the arguments of every `fusiontree` command in the page's code blocks."""
    lines = [line for text in blocks(page, *SHELL) for line in text.replace("\\\n", " ").splitlines()]
    return [found[1] for line in lines if (found := COMMAND.search(line))]


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command, e.g. `data build`, with its parser."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from parsers(below, f"{name} {word}".strip())


def strings(path: Path) -> Iterator[str]:
    """Yield every string of a Python file, with each formatted value replaced by X."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


PARSERS = dict(parsers(cli._parser()))
OPTIONS = {option for parser in PARSERS.values() for option in parser._option_string_actions}
EXAMPLES = [parser.epilog.removeprefix("Example: fusiontree ") for parser in PARSERS.values() if parser.epilog]
SHOWN = [pytest.param(command, id=f"{page.stem}: {command}") for page in PAGES for command in commands(page)]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def check_mention(text: str) -> None:
    """Check the command and the options in `text`, which may omit arguments and contain placeholders."""
    words = text.split()
    name = max((name for name in PARSERS if words[: len(name.split())] == name.split()), key=len)
    is_group = PARSERS[name].get_default("handler") is None
    assert not is_group or (name and words == name.split()), f"no command fusiontree {text}"
    for option in OPTION.findall(text):
        assert option in PARSERS[name]._option_string_actions, f"fusiontree {name} has no option {option}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Enter a folder with the dataset and the hostfile that the pages' commands name."""
    (tmp_path / "data" / "books").mkdir(parents=True)
    write_manifest(tmp_path / "data" / "books", 8192)
    (tmp_path / "hosts").write_text("host1 slots=8\nhost2 slots=8\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [*SHOWN, *EXAMPLES])
def test_commands_parse_and_their_configurations_load(command, place, capsys):
    args = cli._parser().parse_args(shlex.split(command))
    check_mention(command)  # argparse accepts abbreviated options
    config = getattr(args, "config", None) or getattr(args, "preset", None)
    if config in preset_names():
        load_config(config, args.overrides)
    if "data.path=data/books" in command and command.startswith("launch"):
        assert cli.main([*shlex.split(command), "--dry-run"]) == 0, capsys.readouterr().err


def test_the_readme_starts_with_two_commands():
    text = next(text for text in blocks(README, *SHELL) if "make" in text)
    assert [line.split()[:2] for line in text.splitlines()] == [["make", "demo"], ["make", "test"]]


def test_the_readme_shows_every_stage():
    shown = {tuple(command.split()[: 2 if command.startswith("data ") else 1]) for command in commands(README)}
    stages = ("doctor", "launch", "status", "report", "export", "prune", "generate", "eval", "bench")
    data = ("tokenizer", "build", "verify", "inspect")
    assert shown == {(name,) for name in stages} | {("data", name) for name in data}


@every_page
def test_mentioned_commands_and_options_exist(page):
    for text in spans(page):
        if text.startswith("fusiontree "):
            check_mention(text.removeprefix("fusiontree "))
        elif any(text.startswith(f"{name} --") for name in PARSERS if name):
            check_mention(text)
        elif text.startswith("--"):
            assert {*OPTION.findall(text)} <= OPTIONS | OTHER_PROGRAMS, text


def test_messages_and_docstrings_name_existing_commands():
    for path in SOURCES:
        for text in strings(path):
            for mention in re.findall(r"(?:`|  )fusiontree ([a-z][^`\n]*)", text):
                check_mention(mention)


@every_page
def test_mentioned_keys_exist(page):
    for text in spans(page):
        found = re.match(r"([a-z_]+)(\.\w+)+(?=$|=|: )", text)
        if found and found[1] in SECTIONS and not text.endswith((".md", ".py", ".yaml")):
            assert is_key(found[0]), f"no key {found[0]}"


@every_page
def test_yaml_blocks_load(page, tmp_path):
    for text in blocks(page, "yaml"):
        entries = re.split(r"\n(?=\S)", text.strip())
        keys = {entry.partition(":")[0] for entry in entries}
        # a block that repeats a key shows alternatives
        for number, part in enumerate([text] if len(keys) == len(entries) else entries):
            (tmp_path / f"{number}.yaml").write_text(part if "base" in keys else f"base: 1b\n{part}")
            load_config(str(tmp_path / f"{number}.yaml"))


@every_page
def test_python_blocks_are_valid(page):
    for text in blocks(page, "python"):
        ast.parse(text)


def test_the_readme_lists_the_presets():
    (named,) = re.findall(r"preset's name \(`([^`]*)`\)", README.read_text())
    assert sorted(named.split()) == preset_names()


@every_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)} <= {*targets}


def test_extras_in_pages_and_messages_exist():
    for path in (*PAGES, *SOURCES):
        for names in re.findall(r"'(?:fusiontree|\.)\[([\w,]+)\]'", path.read_text()):
            assert {*names.split(",")} <= {*EXTRAS}, path


def test_the_kernels_are_installed_without_build_isolation():
    for path in (*PAGES, *SOURCES):  # their builds import torch, which an isolated build lacks
        for command in re.findall(r"pip install [^`\n;:]*", path.read_text()):
            assert "cuda" not in command or "--no-build-isolation" in command, f"{path}: {command}"


@every_page
def test_paths_and_links_exist(page):
    for text in spans(page):
        assert not re.fullmatch(PATHS, text) or (ROOT / text).exists(), f"no {text}"
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"no {link}"
        assert not anchor or anchor in anchors(target), f"no {link}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
