"""Small files of state, read with checks: a torn or foreign file gives one line, never a traceback.

`read_stored` reads a file against a description of its contents, a subclass of `Stored`. The caller turns a
`DamagedError` into its own error, or uses `read_or_none`, which names the file and the fallback on the console.
"""

import contextlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusiontree.console import console
from fusiontree.errors import short_cause

T = TypeVar("T")
S = TypeVar("S", bound="Stored")
_MAX_BYTES = 2**26  # of a file
_SHOWN_KEYS = 12  # missing keys in a message

Count = Annotated[int, Field(ge=0, lt=2**53)]  # updates, tokens, rows: exact as a float too
Time = Annotated[float, Field(ge=0, lt=2**37)]  # seconds since 1970, below the year 6000


class DamagedError(ValueError):
    """A file whose contents cannot be used. The message is a short reason without the file's path."""


class Stored(BaseModel):
    """Contents of a JSON object: values of exactly the stated types, finite numbers. Further keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Raises:
        FileNotFoundError: it is missing.
        DamagedError: it is a folder or a device, or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DamagedError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
        with open(path, "rb") as stream:
            yield stream
    except NotADirectoryError:
        raise FileNotFoundError(path) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"it cannot be read: {short_cause(error)}") from None


def read_bytes(path: Path) -> bytes:
    """Return the contents of a small file.

    Raises:
        FileNotFoundError, DamagedError: see `open_regular`; or it is too large for a file of state.
    """
    with open_regular(path) as stream:
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DamagedError(f"it is larger than {_MAX_BYTES:,} bytes")
    return content


def read_line(path: Path) -> str:
    """Return the text of a file of one line, without the line's end.

    Raises:
        FileNotFoundError, DamagedError: see `open_regular`; or it is not one line of text.
    """
    try:
        text = read_bytes(path).decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise DamagedError("it is not text") from None
    if not text:
        raise DamagedError("it is empty")
    if not text.isprintable():
        raise DamagedError("it is not one line of text")
    return text


def read_stored(path: Path, kind: type[S]) -> S:
    """Return the contents of a JSON file.

    Args:
        path: the file.
        kind: the description of its contents.

    Raises:
        FileNotFoundError, DamagedError: see `open_regular`; or the contents do not fit the description.
    """
    return parse_stored(read_bytes(path), kind)


def parse_stored(text: bytes, kind: type[S]) -> S:
    """Return the JSON object in `text`; raise DamagedError if it does not fit the description `kind`."""
    if not text.strip():
        raise DamagedError("it is empty")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise DamagedError(_format(error)) from None


def _format(error: ValidationError) -> str:
    """Return the first problem as a short reason; missing keys are listed together."""
    found = error.errors(include_url=False, include_input=False)
    missing = [_key(problem["loc"]) for problem in found if problem["type"] == "missing"]
    if missing:
        more = f" and {len(missing) - _SHOWN_KEYS} more" if len(missing) > _SHOWN_KEYS else ""
        return f"it lacks {', '.join(missing[:_SHOWN_KEYS])}{more}"
    first = found[0]
    if first["type"] == "json_invalid":
        return "it is not JSON"
    if not first["loc"]:
        return "it is not a JSON object"
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return f"{_key(first['loc'])} {reason}"


def _key(location: tuple[int | str, ...]) -> str:
    text = ".".join(map(str, location))
    return text if text.isprintable() and len(text) <= 80 else ascii(text[:80])


def read_or_none(path: Path, read: Callable[[Path], T], fallback: str) -> T | None:
    """Return `read(path)`, or None if the file is missing, or damaged: then name it, with the fallback, on the console.

    Args:
        path: the file.
        read: raises FileNotFoundError or DamagedError.
        fallback: what applies in its place, for the console.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        console.print(f"{path} is damaged ({short_cause(error)}); {fallback}")
        return None
