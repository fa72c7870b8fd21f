"""Stop requests: SIGTERM and SIGUSR1 end a run where it loses nothing.

Python runs a signal's handler in the main thread, between two instructions, and so never in a rank that waits in C++
for a peer. But the interpreter's C handler also writes each signal's number to a pipe (`signal.set_wakeup_fd`), which a
thread reads here:

| signal                                   | effect                                                          |
|------------------------------------------|-----------------------------------------------------------------|
| the first, before `defer`                | the process ends at once with `StoppedError`'s code             |
| the first, after `defer`                 | sets the flag `requested`; the run saves and exits              |
| another, within `REPEAT` seconds         | none                                                            |
| another, later                           | the kernel kills the process, by the signal's default action    |
"""

import contextlib
import ctypes
import os
import signal
import threading
import time

from fusiontree.distributed import outcome
from fusiontree.errors import StoppedError

STOPS = (signal.SIGTERM, signal.SIGUSR1)
# seconds between two signals from which the second kills; a scheduler signals a process and its parent at once
REPEAT = 2.0
_requested: signal.Signals | None = None  # the first signal since `listen`
_deferred = False


def listen() -> None:
    """Handle SIGTERM and SIGUSR1 as stop requests from now on; call it in the main thread."""
    global _requested, _deferred
    _requested, _deferred = None, False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in STOPS:
        signal.signal(number, lambda number, frame: None)  # a Python handler makes the C handler write to the pipe
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def defer() -> None:
    """Leave stop requests to the caller from now on: it polls `requested`, saves and exits."""
    global _deferred
    _deferred = True


def requested() -> signal.Signals | None:
    """Return the signal that requested a stop, or None."""
    return _requested


def _watch(reader: int) -> None:
    """Wait for the first stop request and act on it; then let the kernel act on the next."""
    global _requested
    number: int = 0
    while number not in STOPS:
        number = os.read(reader, 1)[0]
    if not _deferred:
        _leave(signal.Signals(number))
    _requested = signal.Signals(number)
    time.sleep(REPEAT)
    libc = ctypes.CDLL(None)  # `signal.signal` works in the main thread only
    for stop in STOPS:
        libc.signal(ctypes.c_int(stop), ctypes.c_void_p(signal.SIG_DFL))


def _leave(number: signal.Signals) -> None:
    """Report the stop and end the process, whose main thread may be waiting in C++."""
    message = f"stopped by {number.name} before the first step; start again"
    with contextlib.suppress(OSError):  # a full disk
        outcome.announce(StoppedError.exit_code, message)
    os._exit(StoppedError.exit_code)
