"""Arguments common to several subcommands."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fusiontree import paths
from fusiontree.errors import UserError

FORMAT = argparse.RawDescriptionHelpFormatter  # does not wrap the example
_NUMBER = re.compile(r"-\d+|-\d*\.\d+(e-?\d+)?")
_FEWEST: dict[Any, int] = {None: 1, "+": 1, "?": 0, "*": 0}  # words that an argument needs, by nargs
_MOST: dict[Any, int] = {None: 1, "?": 1, 0: 0}  # words that it takes; unlimited for "+" and "*"


_Value = TypeVar("_Value")


def local_path(text: str) -> Path:
    """Read a path argument; see `paths.local_path`."""
    return _argument(paths.local_path, text)


def local_pattern(text: str) -> str:
    """Read an argument that is a path or a glob pattern; see `paths.local_pattern`."""
    return _argument(paths.local_pattern, text)


def location(text: str) -> str:
    """Read an argument that is a folder or an address; see `paths.location`."""
    return _argument(paths.location, text)


def _argument(read: Callable[[str], _Value], text: str) -> _Value:
    """Return `read(text)`; raise a user's error as argparse's, which names the argument."""
    try:
        return read(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Word(NamedTuple):
    place: int  # in the command line
    text: str


class _Option(NamedTuple):
    text: str
    nargs: Any  # 0 for an unknown option
    values: list[_Word]


class Parser(argparse.ArgumentParser):
    """Parser that takes options and positional arguments in any order.

    argparse gives an optional positional argument its default as soon as the first positional one has been read, and
    calls a later word unrecognized: ``generate OUT --top-p 0.9 PROMPT``. This parser moves the options to the front.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse `args`; see `argparse.ArgumentParser.parse_known_args`."""
        if args and not any(action.nargs == argparse.PARSER for action in self._actions):
            args = self._options_first(args)
        return super().parse_known_args(args, namespace)

    def _options_first(self, args: Sequence[str]) -> list[str]:
        """Return `args` with the options and their values first, then CONFIG and the other words, then the overrides.

        An option with a variable number of values takes the words after it, except overrides, and except the last of
        them if the command's positional arguments would otherwise lack a word.
        """
        positional = [action for action in self._actions if not action.option_strings]
        overrides = any(action.dest == "overrides" for action in positional)
        options: list[_Option] = []
        words: list[_Word] = []
        room = 0  # words that the last option still takes
        end = args.index("--") if "--" in args else len(args)
        for word in (_Word(index, text) for index, text in enumerate(args[:end])):
            if self._is_option(word.text):
                action = self._action(word.text)
                options.append(_Option(word.text, 0 if action is None else action.nargs, []))
                room = 0 if "=" in word.text else _MOST.get(options[-1].nargs, len(args))
            elif room and not (overrides and "=" in word.text and options[-1].nargs in ("+", "*")):
                options[-1].values.append(word)
                room -= 1
            else:
                words.append(word)
                room = 0
        words += (_Word(index, text) for index, text in enumerate(args) if index > end)
        needed = sum(_FEWEST.get(action.nargs, 0) for action in positional)
        for option in reversed(options):
            while len(words) < needed and len(option.values) > _FEWEST.get(option.nargs, 0):
                words.append(option.values.pop())
        words.sort(key=lambda word: (overrides and "=" in word.text, word.place))
        front = [part for option in options for part in (option.text, *(word.text for word in option.values))]
        return [*front, "--", *(word.text for word in words)] if words else front

    def _is_option(self, text: str) -> bool:
        """Return whether argparse would take `text` for an option: a known one, or any other word after a dash."""
        return text[:1] == "-" and len(text) > 1 and (self._action(text) is not None or not _is_value(text))

    def _action(self, text: str) -> argparse.Action | None:
        """Return the option that `text` names in full or by a unique prefix."""
        name = text.partition("=")[0]
        by_name = {string: action for action in self._actions for string in action.option_strings}
        found = [action for string, action in by_name.items() if name[:2] == "--" and string.startswith(name)]
        return by_name.get(name) or (found[0] if len(found) == 1 else None)


def _is_value(text: str) -> bool:
    """Return whether a word that begins with a dash is a value: a negative number or a text with spaces."""
    return " " in text or _NUMBER.fullmatch(text) is not None


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
    parser: Parser = commands.add_parser(
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
