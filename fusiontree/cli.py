"""The command line. Handlers parse, call and print; what they call is imported when needed, so that --help is quick."""

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import RunError, UserError
from fusiontree.files import write_atomic

# what a file system answers when the user's disk, rights or paths are at fault, not this program
_FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
    *(errno.EBUSY, errno.EXDEV, errno.ELOOP, errno.ESTALE, errno.EFBIG),
}
_NAMED = 10  # inputs left out that are named, unless --json is given
EVAL_TASKS = ("perplexity", "passkey", "needle", "recall", "throughput")
_INTERRUPTED = "interrupted; nothing half-written was left under a final name"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistakes, 1 for what went wrong on the way.

    Any other exception is this program's own mistake and keeps its traceback.
    """
    args = _parse(argv)
    code, message, told = 1, None, False
    try:
        code, message = _outcome(args)
    finally:
        if args.handler in (_train, _probe):
            from fusiontree import outcome

            told = outcome.report(code, message)
    if message and not told:
        rank = os.environ.get("RANK", "0")
        kind = "" if message == _INTERRUPTED else "error: "
        print(f"fusiontree: {kind}{'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr)
    return code


def _outcome(args: argparse.Namespace) -> tuple[int, str | None]:
    """The exit code of the command and the line that explains it."""
    try:
        code: int = args.handler(args)
        sys.stdout.flush()
        return code, None
    except KeyboardInterrupt:
        return 1, _INTERRUPTED
    except (UserError, RunError) as error:
        return error.exit_code, str(error)
    except BrokenPipeError:
        # the reader has left (`| head`): give what is still buffered nowhere to go, so that the exit stays silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        place = error.filename or getattr(args, "output", None) or "the output"
        return 1, f"{place}: {error.strerror}"


# --- commands --------------------------------------------------------------------------------------------------------


def _data_tokenizer(args: argparse.Namespace) -> int:
    from data_tools.tokenizer import train_tokenizer

    figures = train_tokenizer(
        args.input,
        args.vocab_size,
        args.output,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        overwrite=args.overwrite,
        reading=_reading(args),
    )
    return _show(figures, args.json)


def _reading(args: argparse.Namespace) -> Any:
    from data_tools.readers import Reading

    separator = args.doc_separator and args.doc_separator.replace("\\n", "\n").replace("\\t", "\t")
    return Reading(args.text_key, separator, args.min_chars, args.max_chars)


def _data_build(args: argparse.Namespace) -> int:
    from data_tools.build import build

    figures = build(
        args.input,
        args.tokenizer,
        args.output,
        holdout=args.holdout,
        holdout_from=args.holdout_from,
        workers=args.workers,
        row_len=args.row_len,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        overwrite=args.overwrite,
        reading=_reading(args),
        dedup=args.dedup,
        eos=args.eos,
        encoder=args.encoder,
    )
    return _show(figures, args.json)


def _data_verify(args: argparse.Namespace) -> int:
    from data_tools.verify import verify

    figures = verify(args.folder, workers=args.workers)
    _show(figures, args.json)
    return 1 if figures["problems"] else 0


def _data_reindex(args: argparse.Namespace) -> int:
    from data_tools.reindex import reindex

    figures = reindex(args.folder, args.tokenizer, args.eos, args.skip_damaged, args.workers)
    _show(figures, args.json)
    return 1 if figures["problems"] else 0


def _data_inspect(args: argparse.Namespace) -> int:
    from data_tools.inspection import describe, show_row

    if args.row is None:
        return _show(describe(args.folder), args.json)
    return _show(show_row(args.folder, args.row, split=args.split, tokenizer=args.tokenizer), args.json)


def _data_plan(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.data.plan import plan
    from fusiontree.training.data import open_stream, open_training

    config = load_config(args.config, args.overrides)
    figures = plan(open_stream(config, open_training(config)), config.schedule.steps)
    return _show(figures, args.json)


def _data_at(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.data.plan import documents_at
    from fusiontree.training.data import open_stream, open_training

    config = load_config(args.config, args.overrides)
    if not 0 <= args.step < config.schedule.steps:
        raise UserError(f"--step is {args.step}; the steps of the run are 0 to {config.schedule.steps - 1}")
    if not 0 <= args.rank < args.world_size:
        raise UserError(f"--rank is {args.rank}; the ranks are 0 to {args.world_size - 1} (--world-size)")
    figures = documents_at(open_stream(config, open_training(config), args.rank, args.world_size), args.step)
    if args.json:
        return _show(figures, as_json=True)
    for row in figures["rows"]:
        place = f"{row['shard']} row {row['row']} from token {row['first_token']}"
        print(f"batch {row['batch']}  {row['source']} epoch {row['epoch']}  {place}")
        for document in row["documents"]:
            print("  {start:>6} +{length:<6} {id}".format(**document) + f" from {document['offset']}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from fusiontree import signals
    from launcher import local

    local.join_launcher()
    signals.listen()
    from fusiontree.config import load_config

    config = load_config(args.config, args.overrides)
    args.output = config.run_dir
    from fusiontree.training.engine import train

    summary = train(config, args.allow_changed)
    return _show(summary, args.json) if os.environ.get("RANK", "0") == "0" else 0


def _launch(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from launcher import local
    from launcher.plan import plan_local, surroundings

    around = surroundings(args.env, args.env_file, args.pre_command)
    _refuse_stray(args)
    if args.slurm:
        return _launch_slurm(args, around)
    if args.hostfile is not None:
        return _launch_hosts(args, around)
    config = load_config(args.config, args.overrides)
    plan = plan_local(config, args.config, [*args.overrides, *_rank_options(args)], args.local, around)
    if args.dry_run:
        print(local.command_line(plan))
        return 0
    return local.run(plan, config.run_dir / "logs")


def _rank_options(args: argparse.Namespace) -> list[str]:
    """What a launch hands on to the `train` of every rank, beside the configuration."""
    return [*(f"--allow-changed={key}" for key in args.allow_changed), *(["--json"] if args.json else [])]


def _refuse_stray(args: argparse.Namespace) -> None:
    """Raise UserError for an option of another target: it would be silently without effect."""
    target = "--slurm" if args.slurm else "--hostfile" if args.hostfile is not None else "--local"
    for owner, names in _TARGET_OPTIONS.items():
        for name in names if owner != target else ():
            if getattr(args, name) not in (None, [], False):
                raise UserError(f"--{name.replace('_', '-')} belongs to {owner}, not to {target}; leave it out")


def _launch_hosts(args: argparse.Namespace, around: Any) -> int:
    from fusiontree.config import load_config
    from launcher import hostfile
    from launcher.plan import plan_hosts, prepare_run

    config = load_config(args.config, args.overrides)
    hosts = hostfile.read(args.hostfile, args.include or "", args.exclude or "")
    plan = plan_hosts(config, hosts, _rank_options(args), around)
    launcher = args.launcher or "pdsh"
    if args.dry_run:
        print(hostfile.command_line(plan, launcher, config.run_dir.absolute()))
        return 0
    hostfile.check_programs(launcher)
    return hostfile.run(plan, prepare_run(config, args.allow_changed), launcher)


def _launch_slurm(args: argparse.Namespace, around: Any) -> int:
    from fusiontree.config import load_config
    from launcher import slurm
    from launcher.plan import plan_slurm, prepare_run

    config = load_config(args.config, args.overrides)
    nodes = 1 if args.nodes is None else args.nodes
    ranks = args.gpus_per_node if args.ranks_per_node is None else args.ranks_per_node
    if ranks is None:
        raise UserError("--slurm: give --gpus-per-node G, or --ranks-per-node N for ranks on CPUs")
    sweep = slurm.Sweep.of(config.name, args.sweep)
    configs = [load_config(args.config, [*args.overrides, *changes]) for changes in sweep.runs]
    job = _slurm_job(args, slurm.save_ahead(config, nodes) if args.save_ahead is None else args.save_ahead)
    plans = [
        plan_slurm(one, nodes, ranks, args.gpus_per_node is not None, _rank_options(args), around) for one in configs
    ]
    slurm.check(job, nodes)
    folder = config.run_dir.absolute()
    text = slurm.render(plans[0], job, [one.run_dir.absolute() for one in configs], folder / "logs")
    if args.dry_run:
        print(text, end="")
        return 0
    slurm.check_cluster(job)
    for one in configs:
        prepare_run(one, args.allow_changed)
    return _submit(slurm.write(text, folder), folder / "logs", args.wait)


def _slurm_job(args: argparse.Namespace, save_ahead: int) -> Any:
    from launcher.slurm import Job

    return Job(
        gpus_per_node=args.gpus_per_node,
        min_nodes=args.min_nodes,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        time=args.time,
        constraint=args.constraint,
        cpus_per_task=args.cpus_per_task,
        extra=tuple(args.sbatch),
        container=args.container,
        container_mounts=args.container_mounts,
        tasks=args.tasks or "rank",
        save_ahead=save_ahead,
    )


def _submit(script: Path, logs: Path, wait: bool) -> int:
    from launcher import slurm

    job = slurm.submit(script)
    print(
        f"job {job}: {script}\nfollow it with  tail -F {logs}/slurm-{job}*.log\nend it with     scancel {job}",
        flush=True,
    )
    return slurm.follow(job, logs, sys.stdout) if wait else 0


def _status(args: argparse.Namespace) -> int:
    from fusiontree.status import status

    return _show(status(args.run), args.json)


def _export(args: argparse.Namespace) -> int:
    from fusiontree.export import export

    figures = export(
        args.source,
        args.output,
        dtype=args.dtype,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        trust=args.trust_checkpoint,
        prune=args.prune,
        prune_heads=args.prune_heads,
        data=args.data,
        limit=args.limit,
    )
    return _show(figures, args.json)


def _prune(args: argparse.Namespace) -> int:
    from fusiontree.prune.pruner import plan_run

    if args.out is not None and args.out.exists() and not args.overwrite:
        raise UserError(f"plan {args.out} is there already; name another file or pass --overwrite")
    plan = plan_run(args.source, args.hi, args.lo)
    if args.out is not None:
        write_atomic(args.out, json.dumps(plan, indent=1))
    return _show(plan, args.json)


def _generate(args: argparse.Namespace) -> int:
    from fusiontree.generate import Sampling, generate_text, generate_texts, read_prompts

    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give a prompt, or a file of them with --prompts")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    if args.prompts is not None:
        given = read_prompts(args.prompts)
        for figures in generate_texts(args.folder, given, args.max_new_tokens, sampling, args.batch):
            print(json.dumps(figures) if args.json else f"{figures['prompt']}{figures['text']}\n", flush=True)
        return 0
    on_text = None if args.json else _stream
    figures = generate_text(args.folder, args.prompt, args.max_new_tokens, sampling, on_text)
    if args.json:
        return _show(figures, as_json=True)
    print()
    return 0


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _eval(args: argparse.Namespace) -> int:
    from fusiontree.evaluate import evaluate

    figures = evaluate(
        args.folder,
        [task for text in args.tasks for task in text.split(",") if task],
        args.data,
        lengths=_numbers("--lengths", args.lengths),
        seq_len=args.seq_len,
        limit=args.limit,
        samples=args.samples,
        output=args.output,
        overwrite=args.overwrite,
    )
    return _show(figures, args.json)


def _numbers(option: str, text: str | None) -> list[int]:
    """The whole numbers of a list such as 1024,4096."""
    try:
        return [int(part) for part in (text or "").split(",") if part]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers, e.g. 1024,4096") from None


def _doctor(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.doctor import diagnose

    if args.overrides and args.config is None:
        raise UserError("doctor: overrides need a CONFIG before them")
    config = None if args.config is None else load_config(args.config, args.overrides)
    if (args.nodes is not None or args.hostfile is not None) and config is None:
        raise UserError("doctor: --nodes and --hostfile need a CONFIG")
    findings = diagnose(config, args.ranks, 1 if args.nodes is None else args.nodes)
    if config is not None and args.nodes is not None:
        findings = _with_cluster(findings, config, args)
    _show(findings, args.json)
    return 1 if findings["problems"] else 0


def _with_cluster(findings: dict[str, Any], config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The doctor's findings, with what the nodes themselves say if they can be reached."""
    from launcher.probing import probe_cluster

    found = probe_cluster(config, args.nodes, args.ranks, args.hostfile)
    if found is None:
        hint = f"not looked at: run this inside an allocation (salloc --nodes={args.nodes} ...) or with --hostfile FILE"
        return findings | {"cluster": hint}
    from fusiontree.probe import compare

    cluster = compare(found)
    return findings | {"cluster": cluster, "problems": [*findings["problems"], *cluster.pop("problems")]}


def _probe(args: argparse.Namespace) -> int:
    from fusiontree import signals
    from launcher import local

    local.join_launcher()
    signals.listen()
    from fusiontree.probe import probe

    probe(args.target)
    return 0


def _bench_train(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print: standard output is for the figures
        from fusiontree.bench.train import Workload, bench_train

        figures = bench_train(
            args.preset,
            args.overrides,
            Workload(args.documents, args.steps, args.warmup),
            seq_len=args.seq_len,
            batch_tokens=args.batch_tokens,
            recompute=args.recompute,
            peer=args.peer,
            peer_recompute=args.peer_recompute == "full",
            profile=args.profile,
        )
    return _show(figures, args.json)


def _bench_decode(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fusiontree.bench.decode import bench_decode

        figures = bench_decode(args.preset, args.overrides, args.batch, args.context, args.steps)
    return _show(figures, args.json)


def _bench_prune(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fusiontree.bench.prune import bench_prune

        figures = bench_prune(args.preset, args.overrides, args.batch, args.context, args.steps, args.keep)
    return _show(figures, args.json)


def _bench_kernels(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fusiontree.bench.kernels import bench_kernels

        figures = bench_kernels(args.preset, args.overrides, args.seq_len, args.repeats)
    return _show(figures, args.json)


def _bench_loader(args: argparse.Namespace) -> int:
    from fusiontree.bench.loader import bench_loader

    return _show(bench_loader(args.data, args.seq_len, args.rows), args.json)


def _bench_overhead(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fusiontree.bench.overhead import bench_overhead

        figures = bench_overhead(args.config, args.overrides, args.rounds, args.warmup)
    if isinstance(args.json, Path):
        from fusiontree.files import write_atomic

        write_atomic(args.json, json.dumps(figures, indent=2) + "\n")
    return _show(figures, args.json is True)


def _report(args: argparse.Namespace) -> int:
    from fusiontree.report import write_report

    return _show(write_report(args.runs, args.out), args.json)


def _demo(args: argparse.Namespace) -> int:
    from fusiontree.demo import run_demo

    return run_demo(args.root)


# --- printing --------------------------------------------------------------------------------------------------------


_UNITS = {"seconds": "s", "loss": "nats per token", "tokens_per_s": "tokens/s"}  # by the end of a figure's key


def _show(figures: dict[str, Any], as_json: bool) -> int:
    """Print a command's figures, as JSON or as aligned lines; returns 0."""
    if as_json:
        print(json.dumps(figures, indent=2, default=str))
        return 0
    lines = list(_lines(figures))
    width = max((len(label) for label, _ in lines), default=0)
    for label, value in lines:
        print(f"{label:<{width}}  {value}".rstrip())
    return 0


def _skipped(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many inputs were left out and the names of some, with the reason: empty files, which are common, last."""
    if not entries:
        return ["none"]
    names = [_skipped_entry(entry) for entry in sorted(entries, key=lambda e: e["reason"] == "empty")]
    rest = [f"and {len(names) - _NAMED} more; --json names all"] if len(names) > _NAMED else []
    files = sum("places" not in entry for entry in entries)
    documents = sum(entry.get("count", 0) for entry in entries)
    counts = [f"{files:,} files"] * bool(files) + [f"{documents:,} documents"] * bool(documents)
    return [" and ".join(counts), *names[:_NAMED], *rest]


def _skipped_entry(entry: Mapping[str, Any]) -> str:
    """A file, or some of the documents in it, and why it was left out."""
    places = entry.get("places", [])
    more = f" and {entry['count'] - len(places)} more" if places and entry["count"] > len(places) else ""
    where = f" ({', '.join(places)}{more})" if places else ""
    return f"{entry['path']}{where}: {entry['reason']}"


def _lines(figures: dict[str, Any], indent: str = "") -> list[tuple[str, str]]:
    """Label and text of each figure; what is nested stands indented below its name."""
    lines: list[tuple[str, str]] = []
    for key, value in figures.items():
        label = indent + str(key).removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
        if isinstance(value, dict):
            lines += [(label, "" if value else "none"), *_lines(value, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            texts = _skipped(value) if key == "skipped" else [_text(str(key), item) for item in value] or ["none"]
            lines += [(label if i == 0 else "", text) for i, text in enumerate(texts)]
        else:
            lines.append((label, _text(str(key), value)))
    return lines


def _text(key: str, value: Any) -> str:
    """A figure with its unit, which the end of its key names."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v!r}" if isinstance(v, str) else f"{k} {_text(k, v)}" for k, v in value.items())
    if not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.2f} MiB"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    unit = next((unit for ending, unit in _UNITS.items() if key.endswith(ending)), "")
    return f"{number} {unit}".rstrip()


# --- parsing ---------------------------------------------------------------------------------------------------------


_FORMAT = argparse.RawDescriptionHelpFormatter  # keeps an example on one line


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand on either side of the options, which argparse alone does not take."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not ("overrides" in args and all("=" in text and not text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusiontree",
        description="Pretrain hybrid language models: a Mamba and an attention branch, fused by a learned gate.",
        epilog="Example: fusiontree demo",
        formatter_class=_FORMAT,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_data(commands)
    _add_training(commands)
    _add_status(commands)
    _add_model(commands)
    _add_report(commands)
    _add_machine(commands)
    _add_bench(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
    figures: bool = True,
) -> argparse.ArgumentParser:
    """A subcommand; with `figures` it takes --json."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: fusiontree {example}", formatter_class=_FORMAT
    )
    parser.set_defaults(handler=handler)
    if figures:
        parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _add_data(commands: Any) -> None:
    summary = "Make, check and look at datasets."
    data = commands.add_parser(
        "data",
        help=summary,
        description=summary,
        epilog="Example: fusiontree data verify data/books",
        formatter_class=_FORMAT,
    )
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    tokenizer = _command(
        data_commands,
        "tokenizer",
        _data_tokenizer,
        "Train a byte-level BPE tokenizer on text.",
        "data tokenizer --input books/ --vocab-size 8192 --output data/tokenizer",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included")

    build = _command(
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

    verify = _command(
        data_commands,
        "verify",
        _data_verify,
        "Check every byte of a dataset against its checksums; exit 1 if any is wrong.",
        "data verify data/books",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default 1)")

    reindex = _command(
        data_commands,
        "reindex",
        _data_reindex,
        "Make lost indexes and a lost manifest again from the shards; exit 1 if a shard is damaged.",
        "data reindex data/books",
    )
    reindex.add_argument("folder", type=Path, metavar="DIR", help="folder with train/*.tar and validation/*.tar")
    reindex.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the one that made the shards (default: the copy in DIR)"
    )
    reindex.add_argument("--eos", metavar="TOKEN", help="end-of-document token (default: as the tokenizer says)")
    reindex.add_argument(
        "--skip-damaged", action="store_true", help="adopt the sound shards, though others are damaged"
    )
    reindex.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default 1)")

    inspect = _command(
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

    plan = _command(
        data_commands,
        "plan",
        _data_plan,
        "Show what a run will train on: tokens and epochs by source and stage. Nothing is trained.",
        "data plan run.yaml",
    )
    _add_config(plan)

    at = _command(
        data_commands,
        "at",
        _data_at,
        "Show the documents that a run trains on at a step.",
        "data at run.yaml --step 1200 --rank 3 --world-size 8",
    )
    _add_config(at)
    at.add_argument("--step", type=int, required=True, metavar="N", help="optimizer step, from 0")
    at.add_argument("--rank", type=int, default=0, metavar="R", help="of the ranks of the run (default 0)")
    at.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks of the run (default 1)")


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
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds something")


def _add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    nargs = "?" if optional else None
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="a YAML file or a preset, e.g. tiny")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the configuration's")


def _add_training(commands: Any) -> None:
    train = _command(
        commands,
        "train",
        _train,
        "Train on one rank; also what each rank of a launch runs.",
        "train tiny data.path=data/books optimizer.lr=1e-3",
    )
    _add_config(train)
    _add_allow_changed(train)

    launch = _command(
        commands,
        "launch",
        _launch,
        "Train on several ranks: of this machine, of a hostfile's hosts, or of a SLURM cluster.",
        "launch tiny --local 2 data.path=data/books",
    )
    _add_config(launch)
    _add_allow_changed(launch)
    target = launch.add_mutually_exclusive_group(required=True)
    target.add_argument("--local", type=int, metavar="N", help="ranks on this machine")
    target.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts, `NAME slots=N` a line, reached by ssh")
    target.add_argument("--slurm", action="store_true", help="submit a job to SLURM")
    launch.add_argument("--dry-run", action="store_true", help="print the command or script; start nothing")
    launch.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="variable of every rank; repeatable"
    )
    launch.add_argument("--env-file", type=Path, metavar="FILE", help="such variables, KEY=VALUE a line")
    launch.add_argument(
        "--pre-command",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line that runs first on every node, e.g. 'module load cuda'; repeatable",
    )
    _add_hostfile(launch)
    _add_slurm(launch)


# options that mean something for one target only
_TARGET_OPTIONS = {
    "--hostfile": ("launcher", "include", "exclude"),
    "--slurm": (
        *("nodes", "min_nodes", "gpus_per_node", "ranks_per_node", "cpus_per_task", "tasks", "partition", "account"),
        *("qos", "time", "constraint", "container", "container_mounts", "sbatch", "sweep", "save_ahead", "wait"),
    ),
}


def _add_hostfile(launch: argparse.ArgumentParser) -> None:
    group = launch.add_argument_group("with --hostfile")
    group.add_argument("--launcher", choices=("pdsh", "openmpi"), help="what reaches the hosts (default pdsh)")
    group.add_argument("--include", metavar="HOSTS", help="only these, HOST[:SLOT,...][@HOST...]")
    group.add_argument("--exclude", metavar="HOSTS", help="all but these")


def _add_slurm(launch: argparse.ArgumentParser) -> None:
    group = launch.add_argument_group("with --slurm")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of the job (default 1)")
    group.add_argument("--min-nodes", type=int, metavar="N", help="go on with as few as this after losing some")
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each node, a rank on each")
    group.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks of each node (default: its GPUs)")
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of each task")
    group.add_argument("--tasks", choices=("rank", "node"), help="a task is a rank, or a node's ranks (default rank)")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", metavar="NAME", help="as sbatch takes it")
    group.add_argument("--time", metavar="LIMIT", help="time limit of one start, as sbatch takes it")
    group.add_argument(
        "--save-ahead", type=int, metavar="S", help="seconds before the limit at which to save (default: an estimate)"
    )
    group.add_argument("--container", metavar="IMAGE", help="a .sif for apptainer, else an image for pyxis")
    group.add_argument("--container-mounts", metavar="FROM:TO[,...]", help="besides the current folder")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further #SBATCH line, e.g. '--exclusive'"
    )
    group.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V1,V2", help="a job array over values; repeated: product"
    )
    group.add_argument("--wait", action="store_true", help="follow the job; exit with its code")


def _add_status(commands: Any) -> None:
    parser = _command(
        commands,
        "status",
        _status,
        "Tell how a run is doing: queue, step, last figures, checkpoint, incidents.",
        "status runs/books",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")


def _add_allow_changed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="go on from a checkpoint though this value is another one; repeatable",
    )


def _add_model(commands: Any) -> None:
    export = _command(
        commands,
        "export",
        _export,
        "Turn a run or a checkpoint into a Hugging Face folder.",
        "export runs/demo runs/demo/export --dtype bf16",
    )
    export.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder or one checkpoint")
    export.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)")
    export.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights, e.g. 500MB (default 5GB)"
    )
    export.add_argument(
        "--trust-checkpoint", action="store_true", help="unpickle all that the checkpoint holds, which may run any code"
    )
    export.add_argument(
        "--prune", metavar="PLAN|auto|N", help="a plan of `fusiontree prune`, its own, or so many branches by loss"
    )
    export.add_argument(
        "--prune-heads", type=int, default=0, metavar="N", help="global key-value heads to prune, by loss"
    )
    export.add_argument("--data", metavar="DIR", type=Path, help="held-out rows that measure it (default: the run's)")
    export.add_argument("--limit", type=int, metavar="N", help="of these, at most (default: all)")
    _add_overwrite(export)

    prune = _command(
        commands,
        "prune",
        _prune,
        "Say which branches the gates of a run do without, and what that saves.",
        "prune runs/demo --hi 0.8 --lo 0.2 --out plan.json",
    )
    prune.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder or one checkpoint")
    prune.add_argument("--hi", type=float, default=0.8, metavar="G", help="mean gate above which Mamba is enough")
    prune.add_argument("--lo", type=float, default=0.2, metavar="G", help="mean gate below which attention is enough")
    prune.add_argument("--out", type=Path, metavar="FILE", help="write the plan, to edit and to give to export --prune")
    prune.add_argument("--overwrite", action="store_true", help="replace a plan that is there")

    generate = _command(
        commands,
        "generate",
        _generate,
        "Continue a prompt with an exported model.",
        "generate runs/demo/export 'def main(' --max-new-tokens 100 --temperature 0.8",
    )
    generate.add_argument("folder", type=Path, metavar="OUT", help="folder made by `fusiontree export`")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    generate.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or .jsonl; --json: an answer a line",
    )
    generate.add_argument("--batch", type=int, default=8, metavar="N", help="prompts of FILE together (default 8)")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default 128)")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 = greedy (default 0.8)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest only")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold P together"
    )
    generate.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest"
    )
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 = none (default 1)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="(default 0)")

    evaluate = _command(
        commands,
        "eval",
        _eval,
        "Measure an exported model.",
        "eval runs/demo/export --tasks perplexity,passkey --data data/books --lengths 1024,4096",
    )
    evaluate.add_argument("folder", type=Path, metavar="OUT", help="folder made by `fusiontree export`")
    evaluate.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=f"of {', '.join(EVAL_TASKS)}")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    evaluate.add_argument("--seq-len", type=int, metavar="N", help="tokens per row of perplexity (default: as trained)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="rows at most (default: all)")
    evaluate.add_argument("--lengths", metavar="N,N,...", help="tokens of prompts (default: as trained)")
    evaluate.add_argument("--samples", type=int, default=5, metavar="N", help="prompts of each kind (default 5)")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="folder to make: results.json, heat maps as PNG")
    _add_overwrite(evaluate)


def _add_report(commands: Any) -> None:
    report = _command(
        commands,
        "report",
        _report,
        "Write a run's curves, gates, incidents and configuration as one HTML page; several runs are compared.",
        "report runs/demo",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html, compare.html of several)"
    )


def _add_machine(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "Report versions, devices and kernels; with CONFIG, exit 1 if it cannot run here.",
        "doctor tiny --ranks 2 data.path=data/books",
    )
    _add_config(doctor, optional=True)
    doctor.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks that CONFIG would run on, a node")
    doctor.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of the job; they are looked at inside an allocation of SLURM"
    )
    doctor.add_argument("--hostfile", type=Path, metavar="FILE", help="or through this hostfile")
    probe = commands.add_parser("probe")  # for the doctor's own use: not in the help
    probe.add_argument("target", type=Path)
    probe.set_defaults(handler=_probe)

    demo = _command(
        commands,
        "demo",
        _demo,
        "Run the whole product on this machine: text in, a trained and exported model out.",
        "demo --root /tmp/fusiontree-demo",
        figures=False,
    )
    demo.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="folder for data/ and runs/ (default .)")


def _add_bench(commands: Any) -> None:
    summary = "Measure how fast things are here; nothing is written but --profile."
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=summary,
        epilog="Example: fusiontree bench train --preset tiny",
        formatter_class=_FORMAT,
    )
    bench_commands = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(
        bench_commands,
        "train",
        _bench_train,
        "Measure training under the real engine, beside a peer's if wished.",
        "bench train --preset 1b --seq-len 32768 --peer hf-falcon-h1",
    )
    _add_preset(train)
    train.add_argument("--seq-len", type=int, metavar="N", help="tokens per row (default: the preset's)")
    train.add_argument("--batch-tokens", type=int, metavar="N", help="tokens per update (default: one row)")
    train.add_argument(
        "--documents",
        choices=("packed", "single"),
        default="packed",
        help="documents of random lengths, or one a row (default packed)",
    )
    train.add_argument("--steps", type=int, default=10, metavar="N", help="updates timed (default 10)")
    train.add_argument("--warmup", type=int, default=3, metavar="N", help="updates before them (default 3)")
    train.add_argument("--recompute", default="none", metavar="KIND", help="activation checkpointing (default none)")
    train.add_argument("--peer", metavar="NAME", help="hf-llama, hf-falcon-h1 or fla-mamba2, in the same run")
    train.add_argument(
        "--peer-recompute", choices=("none", "full"), default="full", help="the peer's checkpointing (default full)"
    )
    train.add_argument("--profile", type=Path, metavar="FILE", help="write where the time of a step goes, in Markdown")

    decode = _command(
        bench_commands,
        "decode",
        _bench_decode,
        "Measure prefill and decoding with random weights.",
        "bench decode --preset 1b --batch 1 64 --context 1024 32768",
    )
    _add_preset(decode)
    decode.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="rows together (default 1)")
    decode.add_argument(
        "--context", type=int, nargs="+", default=[1024], metavar="N", help="tokens of a prompt (default 1024)"
    )
    decode.add_argument("--steps", type=int, default=32, metavar="N", help="tokens made per row (default 32)")

    prune = _command(
        bench_commands,
        "prune",
        _bench_prune,
        "Measure what pruning every second layer to one branch gains, with random weights.",
        "bench prune --preset 1b --context 32768",
    )
    _add_preset(prune)
    prune.add_argument("--batch", type=int, default=1, metavar="N", help="rows together (default 1)")
    prune.add_argument("--context", type=int, default=32768, metavar="N", help="tokens of a prompt (default 32768)")
    prune.add_argument("--steps", type=int, default=64, metavar="N", help="tokens made per row (default 64)")
    prune.add_argument(
        "--keep",
        choices=("alternate", "mamba", "attention"),
        default="alternate",
        help="what every second layer keeps (default: the one and the other in turn)",
    )

    kernels = _command(
        bench_commands,
        "kernels",
        _bench_kernels,
        "Measure every back-end that runs here against the reference.",
        "bench kernels --preset 1b --seq-len 32768",
    )
    _add_preset(kernels)
    kernels.add_argument("--seq-len", type=int, metavar="N", help="tokens in the row (default: the preset's)")
    kernels.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls each (default 10)")

    loader = _command(
        bench_commands,
        "loader",
        _bench_loader,
        "Measure how fast training batches come from a dataset.",
        "bench loader --data data/books",
    )
    loader.add_argument("--data", required=True, metavar="DIR", help="dataset folder or address")
    loader.add_argument("--seq-len", type=int, metavar="N", help="tokens per training row (default: the stored row)")
    loader.add_argument("--rows", type=int, default=1, metavar="N", help="training rows per batch (default 1)")

    overhead = _command(
        bench_commands,
        "overhead",
        _bench_overhead,
        "Measure what the engine costs: a real run beside a bare DeepSpeed loop, in turns.",
        "bench overhead 125m --json overhead.json",
        figures=False,
    )
    _add_config(overhead)
    overhead.add_argument("--rounds", type=int, default=12, metavar="N", help="pairs of blocks timed (default 12)")
    overhead.add_argument("--warmup", type=int, default=1, metavar="N", help="pairs before them (default 1)")
    overhead.add_argument(
        "--json", nargs="?", type=Path, const=True, metavar="FILE", help="print the figures as JSON, or write them"
    )


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", required=True, metavar="CONFIG", help="a preset, e.g. 1b, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the configuration's")
