"""Stop requests: SIGTERM and SIGUSR1 set a flag that the run reads where it can save and exit."""

import os
import signal
import time
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGUSR1)
# seconds between two signals from which the second kills; a scheduler signals a process and its parent at once
REPEAT = 2.0
_requested: tuple[signal.Signals, float] | None = None  # the first signal since `listen`, and when it came


def listen() -> None:
    """Handle SIGTERM and SIGUSR1 as stop requests from now on; a second one ends the process by its default action."""
    global _requested
    _requested = None
    for number in STOPS:
        signal.signal(number, _handle)


def requested() -> signal.Signals | None:
    """Return the signal that requested a stop, or None."""
    return None if _requested is None else _requested[0]


def _handle(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is None:
        _requested = signal.Signals(number), time.monotonic()
    elif time.monotonic() - _requested[1] > REPEAT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
