"""Paths are no patterns: names with brackets, stars and braces, next to folders that these would match."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
from conftest import cli, metrics, settings
from test_resize import ask_to_stop

from fusiontree.checkpoint import store
from fusiontree.console import console, progress_bar
from fusiontree.errors import RunError

ODD = "e[12]*?{x,y} %d '#\" [red]$HOME:smile:"  # as a pattern it would match no folder of this name


def test_every_command_takes_paths_with_the_characters_of_patterns(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / ODD
    texts, tokenizer, data, runs, exported = (
        root / f"{name}{ODD}" for name in ("texts", "tokenizer", "data", "runs", "exported")
    )
    root.mkdir()
    shutil.copytree(corpus, texts)
    cli("data", "tokenizer", "--input", texts, "--output", tokenizer, "--vocab-size", 300)
    build = ("--output", data, "--tokenizer", tokenizer, "--row-len", 512, "--holdout", 0.1)
    cli("data", "build", "--input", texts, *build)
    cli("data", "verify", data)
    cli("data", "inspect", data)
    shutil.copytree(data, root / f"damaged{ODD}")
    (root / f"damaged{ODD}" / "manifest.json").unlink()
    cli("data", "reindex", root / f"damaged{ODD}")
    changes = {"schedule__steps": 3, "logging__tensorboard": True}
    words = settings(json.dumps(str(data)), json.dumps(str(runs)), name="run", **changes)  # values are YAML
    cli("doctor", "tiny", *words)
    cli("data", "plan", "tiny", *words)
    ranks.run(["train", "tiny", *words], tmp_path, setup=ask_to_stop, code=75)
    done = ranks.run(["train", "tiny", *words], tmp_path)
    assert f"resuming {runs / 'run'} from step 1" in done
    assert [line["step"] for line in metrics(runs / "run") if "loss" in line] == [1, 2, 3]
    assert json.loads(cli("status", runs / "run", "--json").stdout)["state"] == "finished"
    cli("report", runs / "run", "--out", root / "page.html")
    cli("data", "at", runs / "run" / "config.yaml", "--step", 2)
    cli("prune", runs / "run", "--out", root / "plan.json")
    cli("export", runs / "run", exported, "--prune", root / "plan.json")
    cli("generate", exported, "tree", "--max-new-tokens", 2)
    cli("eval", exported, "--tasks", "perplexity", "--data", data, "--limit", 2, "--output", root / f"results{ODD}")
    cli("bench", "loader", "--data", data)
    assert {path.name for path in tmp_path.iterdir()} == {ODD, "rank-0.out"}


def test_a_resume_never_loads_the_weights_of_a_sibling(shards: Path, tmp_path: Path) -> None:
    """DeepSpeed's own loader would take ``exp[12]`` for a pattern, and load ``exp1``."""
    short = {"schedule__steps": 3, "validation__every": 0, "deepspeed": "zero2"}
    for output, seed in (("plain", 0), ("exp1", 1)):
        words = settings(shards, tmp_path / output, name="run", seed=seed, **short)
        ranks.run(["train", "tiny", *words], tmp_path, 2)
    words = settings(shards, tmp_path / "exp[12]", name="run", **short)
    ranks.run(["train", "tiny", *words], tmp_path, 2, setup=ask_to_stop, code=75)
    ranks.run(["train", "tiny", *words], tmp_path, 2)
    assert metrics(tmp_path / "exp[12]/run") == metrics(tmp_path / "plain/run") != metrics(tmp_path / "exp1/run")


def test_a_checkpoint_that_differs_from_the_verified_one_is_refused(tmp_path: Path, monkeypatch) -> None:
    class Engine:
        def zero_optimization_stage(self) -> int:
            return 2

    class World:
        rank, size = 1, 2

    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for name in [*names, "mp_rank_00_model_states.pt"]:
        (checkpoint / name).write_bytes(name.encode())
    store.write_manifest(checkpoint)
    verified = store.read_manifest(checkpoint)
    loaded = []
    monkeypatch.setattr(store, "read_state", lambda path: {"zero_stage": 2, "world_size": 2})
    monkeypatch.setattr(store.reshard, "load", lambda *arguments: loaded.append(arguments[1:]))
    monkeypatch.setattr(store.collectives, "on_main", lambda function: verified)
    monkeypatch.setattr(store.collectives, "gather", lambda value: [None, value])
    store.load(Engine(), World(), checkpoint, False)
    assert loaded == [(checkpoint, 2, 1, False)]
    (checkpoint / names[0]).write_bytes(b"of another run")  # rank 0 checks this one
    store.load(Engine(), World(), checkpoint, False)
    (checkpoint / names[1]).write_bytes(b"of another run")
    store.write_manifest(checkpoint)
    refusal = r"step-1 is not the checkpoint that rank 0 verified: rank 1 on .*; mount one disk"
    with pytest.raises(RunError, match=refusal):
        store.load(Engine(), World(), checkpoint, False)


def test_the_console_prints_brackets_and_colons_as_they_are(monkeypatch) -> None:
    with console.capture() as captured:
        console.print(f"resuming {ODD}, [/b] [bold]x[/bold]")
        console.rule(ODD, align="left")
    assert f"resuming {ODD}, [/b] [bold]x[/bold]" in captured.get()
    assert ODD in captured.get()
    monkeypatch.setattr(console, "_force_terminal", True)
    bar = progress_bar()
    bar.add_task("[red]pack", total=2, note="[/b]")
    with console.capture() as captured:
        console.print(bar.get_renderable())
    assert "[red]pack" in captured.get()
    assert "[/b]" in captured.get()
