"""``make demo``: from text to a trained and exported hybrid model on a laptop."""

import shlex
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fusiontree.config import load_config
from fusiontree.console import console
from fusiontree.run.folder import MANIFEST_FILE, checkpoint_path
from fusiontree.run.records import summarize
from fusiontree.run.state_files import Count, Stored, read_or_none, read_stored

RANKS = 2
PROMPT = "def main("


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    title: str
    arguments: list[str]
    is_done: bool
    result: str  # its output, for the summary


def run_demo(root: Path) -> int:
    """Run each unfinished stage under `root` and print a summary; return the exit code of the first failure, or 0."""
    folder, run = root / "data" / "demo", root / "runs" / "demo"
    tokenizer, shards, exported = folder / "tokenizer", folder / "shards", run / "export"
    settings = [f"output={root / 'runs'}", "name=demo", f"data.path={shards}"]
    steps = load_config("tiny", settings).schedule.steps
    text = ["--input", sysconfig.get_path("stdlib"), "--include", "*.py"]
    trained = (checkpoint_path(run, steps) / MANIFEST_FILE).exists()
    stages = [
        Stage(
            "train a tokenizer",
            ["data", "tokenizer", *text, "--vocab-size", "8192", "--output", str(tokenizer)],
            (tokenizer / "tokenizer.json").exists(),
            str(tokenizer),
        ),
        Stage(
            "build shards",
            [
                *("data", "build", *text, "--tokenizer", str(tokenizer), "--output", str(shards)),
                *(
                    "--holdout-from",
                    "end",
                    "--workers",
                    str(RANKS),
                ),  # complete packages, which keep sibling files together
            ],
            (shards / "manifest.json").exists(),
            str(shards),
        ),
        Stage("train", ["launch", "tiny", "--local", str(RANKS), *settings], trained, str(run)),
        Stage(
            "export",
            ["export", str(run), str(exported), "--overwrite"],
            trained and _exported_step(exported) == steps,
            str(exported),
        ),
        Stage(
            "generate",
            ["generate", str(exported), PROMPT, "--max-new-tokens", "96", "--temperature", "0.7", "--top-p", "0.9"],
            False,
            "the text above",
        ),
    ]
    seconds: list[float | None] = []
    for number, stage in enumerate(stages, 1):
        console.rule(f"{number}/{len(stages)}  {stage.title}", align="left")
        if stage.is_done:
            console.print(f"already done: reusing {stage.result}")
            seconds.append(None)
            continue
        command = [sys.executable, "-m", "fusiontree", *stage.arguments]
        console.print("$ fusiontree " + shlex.join(stage.arguments), style="dim")
        started = time.perf_counter()
        code = _wait(subprocess.Popen(command))
        seconds.append(time.perf_counter() - started)
        if code:
            console.print(f"the demo stopped: stage '{stage.title}' exited with code {code}; run it again to continue")
            return code
    _print_summary(stages, seconds, run, exported)
    return 0


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a stage and return its exit code; after Ctrl-C, which the stage receives too, wait for its cleanup."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


class _Facts(Stored):
    step: Count


def _exported_step(exported: Path) -> int | None:
    path = exported / "fusiontree.json"
    facts = read_or_none(path, lambda path: read_stored(path, _Facts), "the run is exported again")
    return None if facts is None else facts.step


def _print_summary(stages: list[Stage], seconds: list[float | None], run: Path, exported: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("stage", "left"), ("time", "right"), ("where", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage, duration in zip(stages, seconds, strict=True):
        table.add_row(stage.title, "reused" if duration is None else f"{duration:.0f} s", stage.result)
    console.rule("summary", align="left")
    console.print(table)
    figures = summarize(run)
    first, last, rate = figures["first_val_loss"], figures["last_val_loss"], figures["tokens_per_s"]
    if first is not None and last is not None and rate is not None:
        console.print(
            f"\nvalidation loss  {first:.3f} -> {last:.3f} nats per token (down {first - last:.3f}), "
            f"{rate:,.0f} tokens/s on {RANKS} CPU ranks"
        )
    console.print(
        "\n"
        "try next:\n"
        f'  fusiontree generate {exported} "class Stack:" --temperature 0.8\n'
        f"  fusiontree eval {exported} --tasks perplexity --data {stages[1].result}\n"
        f"  fusiontree data inspect {stages[1].result} --row 0\n"
        f"  fusiontree doctor 1b"
    )
