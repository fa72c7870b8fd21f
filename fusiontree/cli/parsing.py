"""Arguments common to several subcommands."""

import argparse
from collections.abc import Callable
from typing import Any

FORMAT = argparse.RawDescriptionHelpFormatter  # does not wrap the example


def command(
    commands: Any,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
    figures: bool = True,
) -> argparse.ArgumentParser:
    """Add a subcommand.

    Args:
        commands: the subparsers to add it to.
        name: its name.
        handler: returns its exit code.
        summary: one sentence for --help.
        example: its arguments in an example, without `fusiontree`.
        figures: whether it takes --json.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: fusiontree {example}", formatter_class=FORMAT
    )
    parser.set_defaults(handler=handler)
    if figures:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")


def add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add CONFIG and its KEY=VALUE overrides."""
    nargs = "?" if optional else None
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="a YAML file or a preset, e.g. tiny")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a value of the configuration")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Add --preset, the model to measure, and its KEY=VALUE overrides."""
    parser.add_argument("--preset", required=True, metavar="CONFIG", help="a preset, e.g. 1b, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a value of the configuration")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust-checkpoint."""
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle all objects in the checkpoint, which can run arbitrary code",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the options of a resume: --trust-checkpoint and --allow-changed."""
    add_trust(parser)
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although the value of KEY has changed; repeatable",
    )
