"""Paths and addresses as users write them, in any command and in any key of a configuration.

A location is a folder on this machine or an address (``s3://bucket/books``). A leading ``~`` or ``~user`` is a home
folder, which a shell expands only at the start of a word; variables are not expanded.
"""

import os
from pathlib import Path

from fusiontree.errors import UserError


def is_address(location: Path | str) -> bool:
    """Return whether a location is an address rather than a folder."""
    return "://" in str(location)


def expand_home(text: str) -> str:
    """Return `text` with a leading ``~`` or ``~user`` replaced by the home folder; an address is returned as it is.

    Raises:
        UserError: there is no such home folder.
    """
    expanded = text if is_address(text) else os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise UserError(
            f"{text}: no home folder of {text.partition('/')[0]}; write the complete path, or ./{text} for a name that "
            "begins with ~"
        )
    return expanded


def local_path(text: str) -> Path:
    """Return the path that `text` names on this machine.

    Raises:
        UserError: it is empty or an address, or there is no such home folder.
    """
    return Path(local_pattern(text))


def local_pattern(text: str) -> str:
    """Return a path or glob pattern for files on this machine, its home folder expanded; errors as in `local_path`."""
    if not text:
        raise UserError("the path is empty; name a file or a folder")
    if is_address(text):
        raise UserError(f"{text} is an address, and only a path on this machine can be used here; copy the files there")
    return expand_home(text)


def location(text: str) -> str:
    """Return the folder or address that `text` names.

    Raises:
        UserError: it is empty, or there is no such home folder.
    """
    if not text:
        raise UserError("the path is empty; name a folder or an address")
    return expand_home(text)
