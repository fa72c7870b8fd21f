"""The request to stop: SIGTERM or SIGUSR1, heard at once, answered when the run is at a place to save and leave."""

import os
import signal
import time
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT = 2.0  # seconds after which a further signal means it: a scheduler may send one to a process and its parent
_requested: tuple[signal.Signals, float] | None = None  # the first signal since `listen`, and when it came


def listen() -> None:
    """Take SIGTERM and SIGUSR1 as requests from here on; a second one ends the process as if nobody listened."""
    global _requested
    _requested = None
    for number in STOPS:
        signal.signal(number, _hear)


def requested() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    return None if _requested is None else _requested[0]


def _hear(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is None:
        _requested = signal.Signals(number), time.monotonic()
    elif time.monotonic() - _requested[1] > REPEAT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
