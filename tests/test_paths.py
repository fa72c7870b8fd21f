"""Every command and every key of a configuration reads paths and addresses in the same way."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import counting_dataset

from fusiontree.cli import _parser, main
from fusiontree.cli.parsing import local_path as path_argument
from fusiontree.cli.parsing import local_pattern
from fusiontree.cli.parsing import location as location_argument
from fusiontree.config import RunConfig, load_config, to_yaml
from fusiontree.data.format import Dataset
from fusiontree.errors import UserError
from fusiontree.paths import is_address, local_path, location

PATH_KEYS = ("output", "init_from", "nvme_path", "data.cache", "distill.teacher")
LOCATION_KEYS = ("data.path", "data.sources.a.path", "deepspeed")
# arguments that name a file or folder among other things; their commands call `local_path` or `expand_home`
MIXED = {"--prune", "--keep", "--container", "--container-mounts", "--preset", "CONFIG"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_leading_tilde_is_the_home_folder(home: Path) -> None:
    assert local_path("~/x y") == home / "x y"
    assert location("~") == str(home)
    assert local_path("a/~/b") == Path("a/~/b")
    assert local_path("./~") == Path("~")
    assert location("s3://bucket/~/x") == "s3://bucket/~/x"
    assert local_path("~root") == Path("/root")
    with pytest.raises(
        UserError, match="^~nobody-here/x: no home folder of ~nobody-here; write the complete path, or "
    ):
        location("~nobody-here/x")


def test_an_address_is_kept_as_it_is_written_or_refused() -> None:
    assert location("s3://bucket//books/") == "s3://bucket//books/"
    assert is_address("gs://b")
    assert not is_address("a:/b")
    for read, text, words in (
        (local_path, "s3://bucket/books", "^s3://bucket/books is an address, and only a path on this machine can be"),
        (local_path, "", "^the path is empty"),
        (location, "", "^the path is empty"),
    ):
        with pytest.raises(UserError, match=words):
            read(text)


# --- commands --------------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yield the name and action of every argument of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from ((f"{name} {words}", action) for words, action in arguments(below))
        else:
            yield str((action.option_strings or [action.metavar])[0]), action


def test_every_path_argument_has_one_of_the_two_types() -> None:
    found = dict(arguments(_parser()))
    named = {"DIR", "FILE", "PATH", "RUN", "OUT", "RUN_OR_CHECKPOINT", "IMAGE", "FROM:TO[,...]"}
    types = (path_argument, local_pattern, location_argument)
    untyped = {n for n, a in found.items() if a.metavar in named and a.type not in types}
    assert {name.split()[-1] for name in untyped} <= MIXED
    assert len([a for a in found.values() if a.type is path_argument]) > 25
    assert not [name for name, action in found.items() if action.type is Path]
    datasets = {name for name, action in found.items() if action.type is location_argument}
    assert datasets == {"eval --data", "export --data", "bench loader --data"}


@pytest.mark.parametrize(
    "words",
    [
        ["data", "verify", "s3://bucket/books"],
        ["data", "build", "--input", "s3://bucket/text", "--tokenizer", "t", "--output", "o"],
        ["export", "runs/x", "gs://bucket/out"],
        ["report", "https://host/run"],
    ],
)
def test_an_address_in_place_of_a_path_is_named_as_it_was_given(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (address,) = [word for word in words if "://" in word]
    assert f"{address} is an address, and only a path on this machine" in capsys.readouterr().err
    assert os.listdir() == ["home"]


def test_eval_opens_an_address_as_it_was_given(home: Path, capsys: pytest.CaptureFixture) -> None:
    counting_dataset(home / "books", 2, 2)
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusiontree.evaluate.subject.read_facts", lambda _: {"tokenizer_fingerprint": "g"})
        patch.setattr("fusiontree.evaluate.subject.Dataset", lambda at, split: opened.append(at) or Dataset(at, split))
        for given in ("nfs://bucket/books", "~/books"):
            assert main(["eval", "out", "--tasks", "perplexity", "--data", given]) in (1, 2)
    assert opened == ["nfs://bucket/books", str(home / "books")]
    assert "nfs://bucket/books: unknown protocol nfs" in capsys.readouterr().err


# --- configurations --------------------------------------------------------------------------------------------------


def test_the_lists_of_keys_are_complete() -> None:
    """A key with a path default or type has to be read by one of the two functions."""
    config = load_config("tiny", [f"{key}=given" for key in (*PATH_KEYS, "data.path")])
    dumped = config.model_dump()
    paths = {key for key, value in dumped.items() if isinstance(value, Path)}
    paths |= {f"{name}.{key}" for name in RunConfig.model_fields if isinstance(dumped[name], dict)
              for key, value in dumped[name].items() if isinstance(value, Path)}  # fmt: skip
    assert paths == set(PATH_KEYS)


@pytest.mark.parametrize("key", [*PATH_KEYS, *LOCATION_KEYS])
def test_every_path_of_a_configuration_expands_the_home_folder(key: str, home: Path, tmp_path: Path) -> None:
    tree: dict = {"base": "tiny"}
    *sections, name = key.split(".")
    place = tree
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = "~/x"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    for config in (load_config("c.yaml"), load_config("tiny", [f"{key}='~/x'"]), load_config("tiny", [f"{key}=~/x"])):
        value = config.model_dump()
        for part in key.split("."):
            value = value[part]
        assert str(value) == str(home / "x")
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config("again.yaml") == config


@pytest.mark.parametrize("key", PATH_KEYS)
def test_an_address_in_place_of_a_folder_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"^override '{key}=s3://b/x': {key}: s3://b/x is an address"):
        load_config("tiny", [f"{key}=s3://b/x"])


def test_a_configuration_and_its_base_may_be_in_the_home_folder(home: Path, tmp_path: Path) -> None:
    (home / "base.yaml").write_text("base: tiny\nname: from-home\n")
    (tmp_path / "c.yaml").write_text("base: ~/base.yaml\n")
    assert load_config("c.yaml").name == load_config("~/base.yaml").name == "from-home"
