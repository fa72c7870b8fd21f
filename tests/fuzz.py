"""Harness of tests/test_fuzz_*.py: seeded cases, and mutations of files and of JSON values.

The suite runs a fixed number of cases; `make fuzz` runs each of those tests for FUZZ_SECONDS seconds.
"""

import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from fusiontree.errors import RunError, UserError

# values that JSON can have in place of any other
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**18, 10**400),
    *(0.0, -0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "../x", "/", "a\nb", "[red]", "\x1b[31m", "\ud800", "\0", "x" * 10_000),
    *([], {}, [[]], [{}], [None], {"": None}, {"x": [1]}),
)
MAX_MESSAGE = 2000  # characters of an error's line


def run_cases(count: int, check: Callable[[random.Random], None]) -> None:
    """Call `check` with the random generator of each case: of `count` cases, or with FUZZ_SECONDS for that long.

    Case k gets ``random.Random(k)``. A failure names its case; FUZZ_FIRST=k starts there.
    """
    seconds, first = float(os.environ.get("FUZZ_SECONDS", 0)), int(os.environ.get("FUZZ_FIRST", 0))
    end = time.monotonic() + seconds
    case = first
    while (time.monotonic() < end) if seconds else (case < first + count):
        try:
            check(random.Random(case))
        except BaseException as error:
            error.add_note(f"fuzz case {case}: repeat it with FUZZ_FIRST={case}")
            raise
        case += 1


def attempt(function: Callable[[], Any]) -> Any:
    """Call a function that reads mutated input; return its result, or its error if that is one line for users.

    Any other exception is raised.
    """
    try:
        return function()
    except (UserError, RunError) as error:
        line = str(error)
        assert line, "an error without a message"
        assert line.isprintable(), f"not one printable line: {line!r}"
        assert len(line) <= MAX_MESSAGE, f"{len(line)} characters: {line[:200]}"
        return error


def mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    """Return `content` with one to four changes: flipped bits, hostile bytes, a removed, repeated or inserted range."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        end = min(len(changed), at + draw.choice((1, 2, 4, 8, 16, 512)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at:end] = draw.choice((b"\0", b"\xff", b"\x80", b"\n", b"-", b"9")) * (end - at)
        elif kind == 2:
            changed[at:end] = draw.randbytes(end - at)
        elif kind == 3:
            del changed[at:end]
        elif kind == 4:
            changed[at:at] = changed[at:end]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_json(draw: random.Random, values: Any) -> Any:
    """Return a copy of a JSON value with one to three changes at any depth.

    A change replaces a value by a hostile one or a neighbor's, removes or duplicates an entry, adds a key, or shifts a
    number.
    """
    changed = [copy.deepcopy(values)]  # a list around it, so that the root can be replaced too
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        parent, key = draw.choice(places)
        old, kind = parent[key], draw.randrange(8)
        if kind == 0 and type(old) in (int, float):
            parent[key] = old + draw.choice((-1, 1, 7, -(2**32), 2**32))
        elif kind == 1 and isinstance(old, str) and old:
            parent[key] = mutate_bytes(draw, old.encode()).decode(errors="replace")
        elif kind == 2 and parent is not changed:
            del parent[key]
        elif kind == 3:
            other, place = draw.choice(places)
            parent[key] = copy.deepcopy(other[place])
        elif kind == 4 and isinstance(parent, list) and parent is not changed:
            parent.insert(key, copy.deepcopy(old))
        elif kind == 5 and isinstance(parent, dict):
            parent[draw.choice(("", "x", "step", "format"))] = copy.deepcopy(old)
        else:
            parent[key] = copy.deepcopy(draw.choice(HOSTILE))
    return changed[0]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value below `tree`."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield tree, key
        yield from _places(value)
