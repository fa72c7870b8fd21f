"""What this machine's network has to give."""

import itertools
import socket


def free_port(first: int | None = None) -> int:
    """A TCP port that nothing listens on at this moment.

    Args:
        first: take the first free one from here on, on any interface; None: any, on the loopback interface. Jobs that
            start at one time on one machine look from different places, so that they do not meet.
    """
    if first is None:
        return _bound("127.0.0.1", 0)
    for port in itertools.count(first):
        try:
            return _bound("", port)
        except OSError:
            continue
    raise AssertionError("ports end in an OverflowError")


def _bound(address: str, port: int) -> int:
    with socket.socket() as probe:
        probe.bind((address, port))
        found: int = probe.getsockname()[1]
    return found
