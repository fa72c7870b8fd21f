"""Heartbeat between a launch and its ranks on other hosts, through a file on a shared disk.

ssh and pdsh do not end remote processes when they are killed themselves. So the launch rewrites a heartbeat file, and
every rank polls it. A rank gets SIGTERM when the file requests a stop or has not changed for `MAX_MISSED` polls; it
saves and exits. A rank that cannot exit in time, because its peers are gone or a network partition has cut off its
host, gets SIGKILL.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fusiontree.files import write_atomic

FILE = "heartbeat"
STOP = "stop"
INTERVAL = 2.0  # seconds between two heartbeats, and between two polls
MAX_MISSED = 30  # consecutive polls without a new heartbeat after which the launch counts as dead


class Heartbeat:
    """The launch's end of the heartbeat: a counter in the file, replaced by the request to stop."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.stopping = threading.Event()
        self.lock = threading.Lock()  # a late heartbeat must not overwrite the request to stop

    def request_stop(self, grace: float) -> None:
        """Ask all ranks to save and exit; ranks that still run after `grace` seconds are killed."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            write_atomic(self.path, f"{STOP} {grace}")

    def _send(self) -> None:
        count = 0
        while not self.stopping.wait(INTERVAL):
            count += 1
            with contextlib.suppress(OSError), self.lock:  # a full or hung disk: the next heartbeat may succeed
                if not self.stopping.is_set():
                    write_atomic(self.path, str(count))


@contextlib.contextmanager
def sending(folder: Path, grace: float) -> Iterator[Heartbeat]:
    """Send heartbeats through `folder` while the block runs, then ask the remaining ranks to exit.

    Args:
        grace: seconds that the remaining ranks have before they are killed.
    """
    heartbeat = Heartbeat(folder)
    write_atomic(heartbeat.path, "0")
    thread = threading.Thread(target=heartbeat._send, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        heartbeat.request_stop(grace)
        thread.join()


def watch(folder: Path, grace: float) -> None:
    """Poll the heartbeat on a rank, in a thread of its own; end this process on a stop request or a dead launch.

    Args:
        grace: seconds between SIGTERM and SIGKILL, unless the stop request names another time.
    """
    last, missed = "", 0
    while not last.startswith(STOP) and missed < MAX_MISSED:
        time.sleep(INTERVAL)
        try:
            current = (folder / FILE).read_text()
        except OSError:
            current = last
        last, missed = (current, 0) if current != last else (last, missed + 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(last.removeprefix(STOP)) if last.startswith(STOP) else grace)
    os.kill(os.getpid(), signal.SIGKILL)
