"""README: its commands parse and its configuration loads."""

import re
import shlex
from pathlib import Path

import pytest

from fusiontree import cli
from fusiontree.config import load_config, preset_names

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip()
    for language, text in BLOCKS
    if not language
    for line in text.splitlines()
    if line.startswith("fusiontree")
]


def test_it_starts_with_the_two_commands() -> None:
    assert [line.split()[:2] for line in BLOCKS[1][1].splitlines()] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    assert cli._parse(shlex.split(command)[1:]).handler is not None


def test_every_command_is_shown() -> None:
    shown = {tuple(command.split()[1 : 3 if " data " in command else 2]) for command in COMMANDS}
    names = ("doctor", "launch", "status", "report", "export", "prune", "generate", "eval", "bench")
    expected = {(name,) for name in names}
    assert shown == expected | {("data", name) for name in ("tokenizer", "build", "verify", "inspect")}


def test_the_configuration_loads_and_the_presets_exist(tmp_path: Path) -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    (tmp_path / "books.yaml").write_text(text)
    assert load_config(str(tmp_path / "books.yaml")).model.window == 2048
    named = re.search(r"preset's name \(`([^`]*)`\)", README)
    assert named is not None
    assert sorted(named[1].split()) == preset_names()
