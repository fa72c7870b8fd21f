"""``fusiontree train``, ``status`` and ``report``: training, and views of a run."""

import argparse
import os
from typing import Any

from fusiontree.cli.parsing import add_config, add_resume, command, local_path
from fusiontree.cli.printing import show
from launcher.join import join_launcher


def _train(args: argparse.Namespace) -> int:
    from fusiontree.distributed import signals

    signals.listen()
    join_launcher()
    from fusiontree.config import check_deepspeed_file, load_config

    config = load_config(args.config, args.overrides)
    args.output = config.run_dir
    if "RANK" not in os.environ:  # a launch has checked it once for all ranks
        check_deepspeed_file(config)
    from fusiontree.training.trainer import train

    summary = train(config, args.allow_changed, args.trust_checkpoint)
    return show(summary, args.json) if os.environ.get("RANK", "0") == "0" else 0


def _status(args: argparse.Namespace) -> int:
    from launcher.status import status

    return show(status(args.run), args.json)


def _report(args: argparse.Namespace) -> int:
    from fusiontree.report import write_report

    return show(write_report(args.runs, args.out), args.json)


def add(commands: Any) -> None:
    """Add the subcommands to the parser."""
    train = command(
        commands,
        "train",
        _train,
        "Train on one rank; `launch` starts this command on every rank.",
        "train tiny data.path=data/books optimizer.lr=1e-3",
    )
    add_config(train)
    add_resume(train)
    train.set_defaults(is_rank=True)

    status = command(
        commands,
        "status",
        _status,
        "Show the status of a run: queue, step, newest metrics, checkpoint, incidents.",
        "status runs/books",
    )
    status.add_argument("run", type=local_path, metavar="RUN", help="a run's folder, e.g. runs/NAME")

    report = command(
        commands,
        "report",
        _report,
        "Write a run's curves, gates, incidents and configuration to one HTML page; compare several runs.",
        "report runs/demo",
    )
    report.add_argument("runs", type=local_path, nargs="+", metavar="RUN", help="a run's folder, e.g. runs/NAME")
    report.add_argument(
        "--out",
        type=local_path,
        metavar="FILE",
        help="the page (default: RUN/report.html; compare.html for several runs)",
    )
