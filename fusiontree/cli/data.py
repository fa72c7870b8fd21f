"""``fusiontree data``: tokenizers and datasets, and what a run makes of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.parsing import FORMAT, add_config, add_overwrite, command
from fusiontree.cli.printing import show
from fusiontree.errors import UserError

if TYPE_CHECKING:
    from data_tools.options import InputOptions


def _data_tokenizer(args: argparse.Namespace) -> int:
    from data_tools.tokenizers import train_tokenizer

    figures = train_tokenizer(args.input, args.vocab_size, args.output, _input_options(args), args.overwrite)
    return show(figures, args.json)


def _input_options(args: argparse.Namespace) -> "InputOptions":
    from data_tools.options import InputOptions

    separator = args.doc_separator and args.doc_separator.replace("\\n", "\n").replace("\\t", "\t")
    return InputOptions(
        tuple(args.include), tuple(args.exclude), args.text_key, separator, args.min_chars, args.max_chars
    )


def _data_build(args: argparse.Namespace) -> int:
    from data_tools.build import build_shards
    from data_tools.options import BuildOptions

    options = BuildOptions(
        row_len=args.row_len,
        holdout=args.holdout,
        holdout_from=args.holdout_from,
        dedup=args.dedup,
        eos=args.eos,
        encoder=args.encoder,
        input=_input_options(args),
        workers=args.workers,
        overwrite=args.overwrite,
    )
    return show(build_shards(args.input, args.tokenizer, args.output, options), args.json)


def _data_verify(args: argparse.Namespace) -> int:
    from data_tools.verify import verify

    figures = verify(args.folder, workers=args.workers)
    show(figures, args.json)
    return 1 if figures["problems"] else 0


def _data_reindex(args: argparse.Namespace) -> int:
    from data_tools.reindex import reindex

    figures = reindex(args.folder, args.tokenizer, args.eos, args.skip_damaged, args.workers)
    show(figures, args.json)
    return 1 if figures["problems"] else 0


def _data_inspect(args: argparse.Namespace) -> int:
    from data_tools.inspection import describe, show_row

    if args.row is None:
        return show(describe(args.folder), args.json)
    return show(show_row(args.folder, args.row, split=args.split, tokenizer=args.tokenizer), args.json)


def _data_plan(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.data.preview import preview_run
    from fusiontree.run.data import open_stream, open_training

    config = load_config(args.config, args.overrides)
    figures = preview_run(open_stream(config, open_training(config)), config.schedule.steps)
    return show(figures, args.json)


def _data_at(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.data.preview import documents_at
    from fusiontree.run.data import open_stream, open_training
    from fusiontree.training.resume import seek_before

    config = load_config(args.config, args.overrides)
    if not 0 <= args.step < config.schedule.steps:
        raise UserError(f"--step is {args.step}; the steps of the run are 0 to {config.schedule.steps - 1}")
    if args.rank is not None and args.world_size is None:
        raise UserError(f"--rank is {args.rank}, of how many? give the run's ranks at that step as --world-size, too")
    rank, world_size = args.rank or 0, args.world_size or 1
    if not 0 <= rank < world_size:
        raise UserError(f"--rank is {rank}; the ranks are 0 to {world_size - 1}: give another, or another --world-size")
    stream = open_stream(config, open_training(config), rank, world_size)
    figures = {"step": args.step, **documents_at(stream, seek_before(args.step, config, stream))}
    if args.json:
        return show(figures, as_json=True)
    for row in figures["rows"]:
        place = f"{row['shard']} row {row['row']} from token {row['first_token']}"
        print(f"batch {row['batch']}  {row['source']} epoch {row['epoch']}  {place}")
        for document in row["documents"]:
            print("  {start:>6} +{length:<6} {id}".format(**document) + f" from {document['offset']}")
        if not row["documents"]:
            print("  padding alone")
    return 0


def add(commands: Any) -> None:
    """Add the subcommands."""
    summary = "Make, check and look at datasets."
    data = commands.add_parser(
        "data",
        help=summary,
        description=summary,
        epilog="Example: fusiontree data verify data/books",
        formatter_class=FORMAT,
    )
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    tokenizer = command(
        data_commands,
        "tokenizer",
        _data_tokenizer,
        "Train a byte-level BPE tokenizer on text.",
        "data tokenizer --input books/ --vocab-size 8192 --output data/tokenizer",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included")

    build = command(
        data_commands,
        "build",
        _data_build,
        "Tokenise text and pack it into WebDataset shards.",
        "data build --input books/ --tokenizer data/tokenizer --output data/books",
    )
    _add_inputs(build)
    build.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    build.add_argument(
        "--holdout", type=float, default=0.02, metavar="SHARE", help="validation documents (default 0.02)"
    )
    build.add_argument(
        "--holdout-from",
        choices=("spread", "end"),
        default="spread",
        help="spread: evenly over the documents (default); end: the last files",
    )
    build.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default 1)")
    build.add_argument("--row-len", type=int, default=32768, metavar="N", help="tokens per stored row (default 32768)")
    build.add_argument("--dedup", action="store_true", help="leave out documents whose text came before")
    build.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: as the tokenizer says)")
    build.add_argument(
        "--encoder",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="library that encodes (default: the faster one if it agrees with the other)",
    )

    verify = command(
        data_commands,
        "verify",
        _data_verify,
        "Check every byte of the shards, and indexes, manifest and tokenizer by them; exit 1 if any is wrong.",
        "data verify data/books",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default 1)")

    reindex = command(
        data_commands,
        "reindex",
        _data_reindex,
        "Make lost indexes and a lost manifest again from the shards; exit 1 if a shard is damaged.",
        "data reindex data/books",
    )
    reindex.add_argument("folder", type=Path, metavar="DIR", help="folder with train/*.tar and validation/*.tar")
    reindex.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="that of the shards, if no manifest is left (default: DIR's copy)"
    )
    reindex.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: as the tokenizer says)")
    reindex.add_argument(
        "--skip-damaged", action="store_true", help="adopt the sound shards, though others are damaged"
    )
    reindex.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default 1)")

    inspect = command(
        data_commands,
        "inspect",
        _data_inspect,
        "Describe a dataset, or show one of its rows.",
        "data inspect data/books --row 7",
    )
    inspect.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    inspect.add_argument("--row", type=int, metavar="N", help="show stored row N, from 0")
    inspect.add_argument("--split", choices=("train", "validation"), default="train", help="the row's split")
    inspect.add_argument("--tokenizer", type=Path, metavar="DIR", help="decode the row with this tokenizer")

    plan = command(
        data_commands,
        "plan",
        _data_plan,
        "Show what a run will train on: tokens and epochs by source and stage. Nothing is trained.",
        "data plan run.yaml",
    )
    add_config(plan)

    at = command(
        data_commands,
        "at",
        _data_at,
        "Show the documents that a run trains on at a step.",
        "data at run.yaml --step 1200 --rank 3 --world-size 8",
    )
    add_config(at)
    at.add_argument("--step", type=int, required=True, metavar="N", help="optimizer step, from 0")
    at.add_argument("--rank", type=int, metavar="R", help="only that rank's documents; needs --world-size")
    at.add_argument("--world-size", type=int, metavar="W", help="ranks of the run (default 1, so the whole batch)")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders or quoted glob patterns of text"
    )
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="only files that match; repeatable"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no files that match; repeatable"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column of the text in JSON and parquet (default text)"
    )
    parser.add_argument(
        "--doc-separator",
        metavar="TEXT",
        help=r"what ends a document in plain text, \n for a new line (default: a file)",
    )
    parser.add_argument("--min-chars", type=int, default=0, metavar="N", help="leave out shorter documents (default 0)")
    parser.add_argument("--max-chars", type=int, metavar="N", help="leave out longer documents")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add_overwrite(parser)
