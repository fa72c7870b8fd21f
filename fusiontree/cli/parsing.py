"""What the parsers of the subcommands share."""

import argparse
from collections.abc import Callable
from typing import Any

FORMAT = argparse.RawDescriptionHelpFormatter  # keeps an example on one line


def command(
    commands: Any,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
    figures: bool = True,
) -> argparse.ArgumentParser:
    """A subcommand; with `figures` it takes --json."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: fusiontree {example}", formatter_class=FORMAT
    )
    parser.set_defaults(handler=handler)
    if figures:
        parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """What an output folder that holds something needs."""
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds something")


def add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """A run's configuration, and values that replace its own."""
    nargs = "?" if optional else None
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="a YAML file or a preset, e.g. tiny")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the configuration's")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The shape that is measured."""
    parser.add_argument("--preset", required=True, metavar="CONFIG", help="a preset, e.g. 1b, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the configuration's")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """That a checkpoint may hold more than tensors."""
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="unpickle all that the checkpoint holds, which may run any code"
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """What a resume may find changed, and may run."""
    add_trust(parser)
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="go on from a checkpoint though this value is another one; repeatable",
    )
