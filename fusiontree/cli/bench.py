"""``fusiontree bench``: benchmarks."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusiontree.cli.parsing import FORMAT, add_config, add_preset, command, local_path, location
from fusiontree.cli.printing import show

Figures = dict[str, Any]


def _shown(bench: Callable[[argparse.Namespace], Figures]) -> Callable[[argparse.Namespace], int]:
    """Return a handler that prints the figures of `bench`; output of libraries goes to standard error meanwhile."""

    def handler(args: argparse.Namespace) -> int:
        with contextlib.redirect_stdout(sys.stderr):
            figures = bench(args)
        return show(figures, args.json is True)

    return handler


def _bench_train(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.train import PeerRun, Workload, bench_train

    workload = Workload(args.documents, args.steps, args.warmup, args.seq_len, args.batch_tokens, args.recompute)
    peer = None if args.peer is None else PeerRun(args.peer, args.peer_recompute == "full")
    return bench_train(args.preset, args.overrides, workload, peer, args.profile)


def _bench_scale(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.scale import ScaleOptions, bench_scale
    from fusiontree.bench.train import Workload

    workload = Workload(args.documents, args.steps, args.warmup, args.seq_len, None, args.recompute)
    options = ScaleOptions(tuple(args.ranks), tuple(args.zero), tuple(args.accumulate), args.peer)
    return bench_scale(args.preset, args.overrides, workload, options)


def _bench_decode(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.decode import bench_decode

    return bench_decode(args.preset, args.overrides, args.batch, args.context, args.steps)


def _bench_prune(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.prune import bench_prune

    return bench_prune(args.preset, args.overrides, args.batch, args.context, args.steps, args.keep, args.prefills)


def _bench_kernels(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.operations import bench_kernels

    return bench_kernels(args.preset, args.overrides, args.seq_len, args.repeats)


def _bench_loader(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.loader import bench_loader

    return bench_loader(args.data, args.seq_len, args.rows)


def _bench_export(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.export import bench_export

    return bench_export(args.preset, args.overrides, args.dtype, args.ranks, args.folder)


def _bench_overhead(args: argparse.Namespace) -> Figures:
    from fusiontree.bench.overhead import bench_overhead

    figures = bench_overhead(args.config, args.overrides, args.rounds, args.warmup)
    if isinstance(args.json, Path):
        from fusiontree.files import write_atomic

        write_atomic(args.json, json.dumps(figures, indent=2) + "\n")
    return figures


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens per row (default: the preset's)")
    parser.add_argument(
        "--documents",
        choices=("packed", "single"),
        default="packed",
        help="documents of random lengths, or one per row (default packed)",
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed updates (default 10)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed updates before them (default 3)")
    parser.add_argument("--recompute", default="none", metavar="KIND", help="activation checkpointing (default none)")


def add(commands: Any) -> None:
    """Add the subcommands."""
    summary = "Measure speed and memory on this machine. Keeps no files except those named by an option."
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=summary,
        epilog="Example: fusiontree bench train --preset tiny",
        formatter_class=FORMAT,
    )
    bench_commands = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = command(
        bench_commands,
        "train",
        _shown(_bench_train),
        "Measure training with the engine of a real run, optionally next to a peer model.",
        "bench train --preset 1b --seq-len 32768 --peer hf-falcon-h1",
    )
    add_preset(train)
    _add_workload(train)
    train.add_argument("--batch-tokens", type=int, metavar="N", help="tokens per update (default: one row)")
    train.add_argument(
        "--peer", metavar="NAME", help="also measure hf-llama, hf-falcon-h1 or fla-mamba2 in the same process"
    )
    train.add_argument(
        "--peer-recompute",
        choices=("none", "full"),
        default="full",
        help="activation checkpointing of the peer (default full)",
    )
    train.add_argument("--profile", type=local_path, metavar="FILE", help="write a profile of one step as Markdown")

    scale = command(
        bench_commands,
        "scale",
        _shown(_bench_scale),
        "Measure training on several numbers of ranks, which this command starts, optionally next to FSDP2.",
        "bench scale --preset 1b --ranks 1 2 --zero 1 3 --peer fsdp2",
    )
    add_preset(scale)
    _add_workload(scale)
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    scale.add_argument("--ranks", **numbers, default=[1, 2], help="numbers of ranks (default 1 2)")
    scale.add_argument("--zero", **numbers, default=[1, 3], help="ZeRO stages (default 1 3)")
    scale.add_argument("--accumulate", **numbers, default=[1], help="backward passes per update (default 1)")
    scale.add_argument("--peer", metavar="NAME", help="also measure the same model under fsdp2")

    decode = command(
        bench_commands,
        "decode",
        _shown(_bench_decode),
        "Measure prefill and decoding with random weights.",
        "bench decode --preset 1b --batch 1 64 --context 1024 32768",
    )
    add_preset(decode)
    decode.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="rows decoded together (default 1)"
    )
    decode.add_argument(
        "--context", type=int, nargs="+", default=[1024], metavar="N", help="prompt length in tokens (default 1024)"
    )
    decode.add_argument("--steps", type=int, default=32, metavar="N", help="tokens generated per row (default 32)")

    prune = command(
        bench_commands,
        "prune",
        _shown(_bench_prune),
        "Measure the gain from pruning layers to one branch, with random weights.",
        "bench prune --preset 1b --context 32768",
    )
    add_preset(prune)
    prune.add_argument("--batch", type=int, default=1, metavar="N", help="rows decoded together (default 1)")
    prune.add_argument(
        "--context", type=int, default=32768, metavar="N", help="prompt length in tokens (default 32768)"
    )
    prune.add_argument("--steps", type=int, default=64, metavar="N", help="tokens generated per row (default 64)")
    prune.add_argument("--prefills", type=int, default=5, metavar="N", help="timed prefills of each model (default 5)")
    prune.add_argument(
        "--keep",
        default="alternate",
        metavar="mamba|attention|alternate|PLAN",
        help="branch that every second layer keeps (default: alternate), or a plan of `fusiontree prune`",
    )

    kernels = command(
        bench_commands,
        "kernels",
        _shown(_bench_kernels),
        "Measure every available kernel back-end against the reference.",
        "bench kernels --preset 1b --seq-len 32768",
    )
    add_preset(kernels)
    kernels.add_argument("--seq-len", type=int, metavar="N", help="tokens per row (default: the preset's)")
    kernels.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="timed calls of each back-end (default 10)"
    )

    loader = command(
        bench_commands,
        "loader",
        _shown(_bench_loader),
        "Measure the throughput of training batches from a dataset.",
        "bench loader --data data/books",
    )
    loader.add_argument("--data", type=location, required=True, metavar="DIR", help="dataset folder or address")
    loader.add_argument("--seq-len", type=int, metavar="N", help="tokens per training row (default: the stored row)")
    loader.add_argument("--rows", type=int, default=1, metavar="N", help="training rows per batch (default 1)")

    export = command(
        bench_commands,
        "export",
        _shown(_bench_export),
        "Measure memory and time of exporting a checkpoint with random weights.",
        "bench export --preset 1b --dtype bf16",
    )
    add_preset(export)
    export.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the export (default fp32)"
    )
    export.add_argument(
        "--ranks", type=int, default=8, metavar="N", help="number of ranks to partition the checkpoint for (default 8)"
    )
    export.add_argument(
        "--folder",
        type=local_path,
        metavar="DIR",
        help="keep the run and the export in this empty folder (default: remove both)",
    )

    overhead = command(
        bench_commands,
        "overhead",
        _shown(_bench_overhead),
        "Measure the overhead of the engine: 5 updates of a real run alternate with 5 of a bare DeepSpeed loop.",
        "bench overhead 125m --json overhead.json",
        figures=False,
    )
    add_config(overhead)
    overhead.add_argument(
        "--rounds",
        type=int,
        default=12,
        metavar="N",
        help="timed rounds, each 5 updates of the run and 5 of the loop (default 12)",
    )
    overhead.add_argument("--warmup", type=int, default=2, metavar="N", help="untimed rounds before them (default 2)")
    overhead.add_argument(
        "--json",
        nargs="?",
        type=local_path,
        const=True,
        metavar="FILE",
        help="print the result as JSON, or write it to FILE",
    )
