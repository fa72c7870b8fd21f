"""Standard output, reserved for a command's results: what libraries print goes to standard error."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_reserved: TextIO | None = None  # standard output, once it is reserved


def reserve_stdout() -> None:
    """Reserve standard output for results: anything that libraries print, also from C++, goes to standard error."""
    global _reserved
    if not isinstance(sys.stdout, io.TextIOWrapper):  # closed by the caller
        return
    sys.stdout.flush()
    _reserved = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")  # noqa: SIM115
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)


def results() -> TextIO:
    """Return the stream for a command's results."""
    return sys.stdout if _reserved is None else _reserved


def print_result(*values: Any, end: str = "\n", flush: bool = False) -> None:
    """Print a part of a command's results."""
    print(*values, end=end, flush=flush, file=results())


@contextlib.contextmanager
def deferred_warnings() -> Iterator[None]:
    """Hold back until the end of the block what Python code other than `print_result` writes to the terminal.

    For a block that prints text as it is generated.
    """
    stderr, held = sys.stderr, io.StringIO()
    stray: Any = contextlib.nullcontext() if _reserved is None else contextlib.redirect_stdout(held)
    try:
        with contextlib.redirect_stderr(held), stray:
            yield
    finally:
        if stderr is not None:  # not closed by the caller
            stderr.write(held.getvalue())
