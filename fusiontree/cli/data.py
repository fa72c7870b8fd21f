"""``fusiontree data``: tokenizers, datasets, and previews of the data that a run trains on."""

import argparse
from typing import TYPE_CHECKING, Any

from fusiontree.cli.parsing import FORMAT, add_config, add_overwrite, command, local_path, local_pattern
from fusiontree.cli.printing import show
from fusiontree.cli.stdout import print_result
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
    from fusiontree.run.datasets import open_stream, open_training

    config = load_config(args.config, args.overrides)
    figures = preview_run(open_stream(config, open_training(config)), config.schedule.steps)
    return show(figures, args.json)


def _data_at(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.data.preview import documents_at
    from fusiontree.run.datasets import open_stream, open_training
    from fusiontree.training.resume import seek_before

    config = load_config(args.config, args.overrides)
    if not 0 <= args.step < config.schedule.steps:
        raise UserError(f"--step {args.step} is out of range; the run has steps 0 to {config.schedule.steps - 1}")
    if args.rank is not None and args.world_size is None:
        raise UserError(f"--rank {args.rank} needs --world-size; give the number of ranks at that step")
    rank, world_size = args.rank or 0, args.world_size or 1
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank} is out of range; --world-size {world_size} has ranks 0 to {world_size - 1}")
    stream = open_stream(config, open_training(config), rank, world_size)
    figures = {"step": args.step, **documents_at(stream, seek_before(args.step, config, stream))}
    if args.json:
        return show(figures, as_json=True)
    for row in figures["rows"]:
        place = f"{row['shard']} row {row['row']} from token {row['first_token']}"
        print_result(f"batch {row['batch']}  {row['source']} epoch {row['epoch']}  {place}")
        for document in row["documents"]:
            print_result("  {start:>6} +{length:<6} {id}".format(**document) + f" from {document['offset']}")
        if not row["documents"]:
            print_result("  only padding")
    return 0


def add(commands: Any) -> None:
    """Add `data` and its subcommands."""
    summary = "Build, verify, repair and inspect datasets."
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
    tokenizer.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="vocabulary size, including 2 special tokens"
    )

    build = command(
        data_commands,
        "build",
        _data_build,
        "Tokenize text and pack it into WebDataset shards.",
        "data build --input books/ --tokenizer data/tokenizer --output data/books",
    )
    _add_inputs(build)
    build.add_argument(
        "--tokenizer", type=local_path, required=True, metavar="DIR", help="tokenizer folder, with tokenizer.json"
    )
    build.add_argument(
        "--holdout",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="fraction of the documents in the validation split (default 0.02)",
    )
    build.add_argument(
        "--holdout-from",
        choices=("spread", "end"),
        default="spread",
        help="spread: hold out documents at even intervals (default); end: hold out the last files",
    )
    build.add_argument("--workers", type=int, default=1, metavar="N", help="tokenizing processes (default 1)")
    build.add_argument("--row-len", type=int, default=32768, metavar="N", help="tokens per packed row (default 32768)")
    build.add_argument("--dedup", action="store_true", help="drop documents whose text occurred earlier in the input")
    build.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: the tokenizer's)")
    build.add_argument(
        "--encoder",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="encoding library (default auto: gigatoken if its token ids equal those of tokenizers)",
    )

    verify = command(
        data_commands,
        "verify",
        _data_verify,
        "Check every byte of the shards, the indexes, the manifest and the tokenizer; exit 1 on any problem.",
        "data verify data/books",
    )
    verify.add_argument("folder", type=local_path, metavar="DIR", help="dataset folder")
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="reading processes (default 1)")

    reindex = command(
        data_commands,
        "reindex",
        _data_reindex,
        "Repair a dataset: rebuild lost indexes and a lost manifest from the shards; exit 1 if a shard is damaged.",
        "data reindex data/books",
    )
    reindex.add_argument("folder", type=local_path, metavar="DIR", help="folder with train/*.tar and validation/*.tar")
    reindex.add_argument(
        "--tokenizer",
        type=local_path,
        metavar="DIR",
        help="tokenizer of the shards, if the manifest is lost (default: the dataset's)",
    )
    reindex.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: the tokenizer's)")
    reindex.add_argument(
        "--skip-damaged", action="store_true", help="adopt the intact shards even if others are damaged"
    )
    reindex.add_argument("--workers", type=int, default=1, metavar="N", help="reading processes (default 1)")

    inspect = command(
        data_commands,
        "inspect",
        _data_inspect,
        "Describe a dataset, or one of its rows.",
        "data inspect data/books --row 7",
    )
    inspect.add_argument("folder", type=local_path, metavar="DIR", help="dataset folder")
    inspect.add_argument("--row", type=int, metavar="N", help="show packed row N, counted from 0")
    inspect.add_argument(
        "--split", choices=("train", "validation"), default="train", help="split of the row (default train)"
    )
    inspect.add_argument(
        "--tokenizer", type=local_path, metavar="DIR", help="decode with this tokenizer (default: the dataset's)"
    )

    plan = command(
        data_commands,
        "plan",
        _data_plan,
        "Preview the data of a run: tokens and epochs by source and stage. Trains nothing.",
        "data plan run.yaml",
    )
    add_config(plan)

    at = command(
        data_commands,
        "at",
        _data_at,
        "Show the documents that a run trains on at one step.",
        "data at run.yaml --step 1200 --rank 3 --world-size 8",
    )
    add_config(at)
    at.add_argument("--step", type=int, required=True, metavar="N", help="optimizer step, counted from 0")
    at.add_argument("--rank", type=int, metavar="R", help="show only the documents of this rank; needs --world-size")
    at.add_argument("--world-size", type=int, metavar="W", help="number of ranks (default 1: show the whole batch)")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        type=local_pattern,
        required=True,
        metavar="PATH",
        help="files, folders or quoted glob patterns",
    )
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="read only matching files; repeatable"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="skip matching files; repeatable"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column of the text in JSON and Parquet (default text)"
    )
    parser.add_argument(
        "--doc-separator",
        metavar="TEXT",
        help=r"separator of documents in plain text, \n for a newline (default: one document per file)",
    )
    parser.add_argument(
        "--min-chars", type=int, default=0, metavar="N", help="drop shorter documents, in characters (default 0)"
    )
    parser.add_argument(
        "--max-chars", type=int, metavar="N", help="drop longer documents, in characters (default 67108864)"
    )
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR", help="output folder")
    add_overwrite(parser)
