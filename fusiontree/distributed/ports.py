"""Free TCP ports of this machine."""

import itertools
import socket


def free_port(first: int | None = None) -> int:
    """Return a TCP port that no process is listening on now.

    Args:
        first: return the first free port from this number on, on any interface; None: any port, on the loopback
            interface. Jobs that start at the same time on one machine pass different numbers to avoid a collision.
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
