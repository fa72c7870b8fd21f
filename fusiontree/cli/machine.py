"""``fusiontree doctor`` and ``demo``: diagnosis of this machine, and a demo run on it."""

import argparse
from pathlib import Path
from typing import Any

from fusiontree.cli.parsing import add_config, command, local_path
from fusiontree.cli.printing import show
from fusiontree.errors import UserError
from launcher import hostfile
from launcher.join import join_launcher


def _doctor(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from fusiontree.doctor.diagnose import diagnose

    if args.overrides and args.config is None:
        raise UserError("doctor: KEY=VALUE needs a CONFIG before it; give a preset or a YAML file")
    for option, count in (("--ranks", args.ranks), ("--nodes", args.nodes)):
        if count is not None and count < 1:
            raise UserError(f"{option} is {count}; it must be at least 1")
    config = None if args.config is None else load_config(args.config, args.overrides)
    if (args.nodes is not None or args.hostfile is not None) and config is None:
        raise UserError("doctor: --nodes and --hostfile need a CONFIG; give a preset or a YAML file")
    if args.hostfile is not None and args.nodes is None:
        args.nodes = len(hostfile.read(args.hostfile))
    findings = diagnose(config, args.ranks, args.nodes)
    if config is not None and args.nodes is not None:
        findings = _with_cluster(findings, config, args)
    show(findings, args.json)
    return 1 if findings["problems"] else 0


def _with_cluster(findings: dict[str, Any], config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return `findings` with those of a probe on the nodes, or with a hint how to reach them."""
    from launcher.probing import probe_cluster

    found = probe_cluster(config, args.nodes, args.ranks, args.hostfile)
    if found is None:
        hint = f"not probed: run this inside an allocation (salloc --nodes={args.nodes} ...) or with --hostfile FILE"
        return findings | {"cluster": hint}
    from fusiontree.doctor.diagnose import node_problems
    from fusiontree.doctor.probe import compare

    cluster, too_small = compare(found), node_problems(findings["run"], found["ranks"])
    return findings | {"cluster": cluster, "problems": [*findings["problems"], *cluster.pop("problems"), *too_small]}


def _probe(args: argparse.Namespace) -> int:
    from fusiontree.distributed import signals

    signals.listen()
    join_launcher()
    from fusiontree.doctor.probe import probe

    probe(args.target)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fusiontree.cli.demo import run_demo

    return run_demo(args.root)


def add(commands: Any) -> None:
    """Add the subcommands to the parser."""
    doctor = command(
        commands,
        "doctor",
        _doctor,
        "Report versions, devices and kernels; with CONFIG, also its memory and disk; exit 1 if it cannot run.",
        "doctor tiny --ranks 2 data.path=data/books",
    )
    add_config(doctor, optional=True)
    doctor.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks per node that CONFIG would run on (default 1)"
    )
    doctor.add_argument(
        "--nodes", type=int, metavar="N", help="nodes that CONFIG would run on; inside a SLURM allocation, probe them"
    )
    doctor.add_argument(
        "--hostfile", type=local_path, metavar="FILE", help="probe the first N hosts of this hostfile (default N: all)"
    )
    probe = commands.add_parser("probe")  # started by doctor on each rank; hidden from the help
    probe.add_argument("target", type=local_path)
    probe.set_defaults(handler=_probe, is_rank=True)

    demo = command(
        commands,
        "demo",
        _demo,
        "Run every stage on this machine: tokenizer, shards, training, export, generation.",
        "demo --root /tmp/fusiontree-demo",
        figures=False,
    )
    demo.set_defaults(has_children=True)
    demo.add_argument(
        "--root", type=local_path, default=Path(), metavar="DIR", help="folder for data/ and runs/ (default .)"
    )
