"""``fusiontree export``, ``prune``, ``generate`` and ``eval``."""

import argparse
import contextlib
import json
from typing import Any

from fusiontree.cli.parsing import add_overwrite, add_trust, command, local_path, location
from fusiontree.cli.printing import show, show_tables
from fusiontree.cli.stdout import deferred_warnings, print_result
from fusiontree.errors import UserError
from fusiontree.evaluate.options import TASK_NAMES, EvalOptions
from fusiontree.export.options import ExportOptions
from fusiontree.files import refuse_below_file, write_atomic


def _export(args: argparse.Namespace) -> int:
    from fusiontree.export.exporter import export

    options = ExportOptions(
        dtype=args.dtype,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        trust=args.trust_checkpoint,
        prune=args.prune,
        prune_heads=args.prune_heads,
        data=args.data,
        limit=args.limit,
    )
    return show(export(args.source, args.output, options), args.json)


def _prune(args: argparse.Namespace) -> int:
    from fusiontree.prune.pruner import plan_run

    if args.out is not None:
        refuse_below_file(args.out)
        if args.out.is_dir():
            raise UserError(f"--out {args.out} is a folder; name a file")
        if args.out.exists() and not args.overwrite:
            raise UserError(f"--out {args.out} exists; name another file or pass --overwrite")
    plan = plan_run(args.source, args.hi, args.lo)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, json.dumps(plan, indent=1))
    return show(plan, args.json)


def _generate(args: argparse.Namespace) -> int:
    from fusiontree.inference.generate import generate_text, generate_texts, read_prompts
    from fusiontree.inference.sampling import Sampling

    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either PROMPT or --prompts FILE")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    if args.prompts is not None:
        given = read_prompts(args.prompts)
        for figures in generate_texts(args.folder, given, args.max_new_tokens, sampling, args.batch):
            print_result(json.dumps(figures) if args.json else f"{figures['prompt']}{figures['text']}\n", flush=True)
        return 0
    on_text = None if args.json else _stream
    with contextlib.nullcontext() if args.json else deferred_warnings():
        figures = generate_text(args.folder, args.prompt, args.max_new_tokens, sampling, on_text)
    if args.json:
        return show(figures, as_json=True)
    print_result()
    return 0


def _stream(text: str) -> None:
    print_result(text, end="", flush=True)


def _eval(args: argparse.Namespace) -> int:
    from fusiontree.evaluate.tasks import evaluate

    options = EvalOptions(
        data=args.data,
        lengths=_parse_numbers("--lengths", args.lengths),
        seq_len=args.seq_len,
        limit=args.limit,
        samples=args.samples,
        output=args.output,
        overwrite=args.overwrite,
    )
    tasks = [task for text in args.tasks for task in text.split(",") if task]
    return show_tables(evaluate(args.folder, tasks, options), args.json)


def _parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Parse a list such as 1024,4096."""
    try:
        return tuple(int(part) for part in (text or "").split(",") if part)
    except ValueError:
        raise UserError(f"{option} is {text!r}; give integers separated by commas, e.g. 1024,4096") from None


def add(commands: Any) -> None:
    """Add the subcommands."""
    export = command(
        commands,
        "export",
        _export,
        "Export a run or a checkpoint to a Hugging Face folder.",
        "export runs/demo out --dtype bf16",
    )
    export.add_argument(
        "source", type=local_path, metavar="RUN_OR_CHECKPOINT", help="folder of a run or of a checkpoint"
    )
    export.add_argument("output", type=local_path, metavar="OUT", help="folder to create")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32)")
    export.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="maximum size of a weights file, e.g. 500MB (default 5GB)",
    )
    add_trust(export)
    export.add_argument(
        "--prune",
        metavar="PLAN|auto|N",
        help="prune by a plan file, the default plan (auto), or N branches whose removal raises held-out loss least",
    )
    export.add_argument(
        "--prune-heads",
        type=int,
        default=0,
        metavar="N",
        help="prune the N global key-value heads whose removal raises held-out loss least",
    )
    export.add_argument(
        "--data", metavar="DIR", type=location, help="dataset with the held-out rows for pruning (default: the run's)"
    )
    export.add_argument("--limit", type=int, metavar="N", help="maximum number of held-out rows (default: all)")
    add_overwrite(export)

    prune = command(
        commands,
        "prune",
        _prune,
        "Plan the pruning of branches by a run's mean gates, and report the savings.",
        "prune runs/demo --hi 0.8 --lo 0.2 --out plan.json",
    )
    prune.add_argument(
        "source", type=local_path, metavar="RUN_OR_CHECKPOINT", help="folder of a run or of a checkpoint"
    )
    prune.add_argument(
        "--hi", type=float, default=0.8, metavar="G", help="keep only Mamba above this mean gate (default 0.8)"
    )
    prune.add_argument(
        "--lo", type=float, default=0.2, metavar="G", help="keep only attention below this mean gate (default 0.2)"
    )
    prune.add_argument(
        "--out",
        type=local_path,
        metavar="FILE",
        help="write the plan for `fusiontree export --prune`; it can be edited",
    )
    prune.add_argument("--overwrite", action="store_true", help="replace an existing plan")

    generate = command(
        commands,
        "generate",
        _generate,
        "Continue a prompt with an exported model.",
        "generate runs/demo/export 'def main(' --max-new-tokens 100 --temperature 0.8",
    )
    generate.add_argument("folder", type=local_path, metavar="OUT", help="folder created by `fusiontree export`")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    generate.add_argument(
        "--prompts",
        type=local_path,
        metavar="FILE",
        help="file with one prompt per line, or .jsonl; with --json, print one result per line",
    )
    generate.add_argument("--batch", type=int, default=8, metavar="N", help="prompts of FILE per batch (default 8)")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens (default 128)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature; 0: greedy (default 0.8)"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default 0: all)"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens with total probability P (default 1)",
    )
    generate.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less likely than P times the likeliest (default 0)",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, make repeated tokens less likely (default 1)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default 0)")

    evaluate = command(
        commands,
        "eval",
        _eval,
        "Evaluate an exported model.",
        "eval runs/demo/export --tasks perplexity,passkey --data data/books --lengths 1024,4096",
    )
    evaluate.add_argument("folder", type=local_path, metavar="OUT", help="folder created by `fusiontree export`")
    evaluate.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=f"any of {', '.join(TASK_NAMES)}")
    evaluate.add_argument("--data", type=location, required=True, metavar="DIR", help="dataset folder or address")
    evaluate.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens per row for perplexity (default: as in training)"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="maximum number of held-out rows (default: all)")
    evaluate.add_argument("--lengths", metavar="N,N,...", help="prompt lengths in tokens (default: as in training)")
    evaluate.add_argument(
        "--samples",
        type=int,
        default=5,
        metavar="N",
        help="prompts per length and depth of a retrieval task (default 5)",
    )
    evaluate.add_argument(
        "--output", type=local_path, metavar="DIR", help="folder to create for results.json and PNG heat maps"
    )
    add_overwrite(evaluate)
