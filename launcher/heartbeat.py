"""A sign of life between a launch and ranks on other hosts, through a folder that all of them share.

ssh and pdsh do not end what they have started when they are ended themselves. So the launching side writes a beat, and
each rank watches it: told to stop there, or without a new beat for too long, it gets SIGTERM, on which it saves and
leaves; where it cannot (its peers are gone, its host is cut off), SIGKILL.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fusiontree.files import write_atomic

FILE = "beat"
STOP = "stop"
INTERVAL = 2.0  # seconds between two beats, and between two looks
MISSED = 30  # looks in a row without a new beat after which the launch is taken for dead


class Beat:
    """The launching side's sign of life."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.stopping = threading.Event()
        self.lock = threading.Lock()  # a beat must not come after the request

    def stop(self, grace: float) -> None:
        """Ask all ranks to save and leave; those that are there `grace` seconds later are killed."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            write_atomic(self.path, f"{STOP} {grace}")

    def _keep(self) -> None:
        count = 0
        while not self.stopping.wait(INTERVAL):
            count += 1
            with contextlib.suppress(OSError), self.lock:  # a full or hung disk: the next beat may get through
                if not self.stopping.is_set():
                    write_atomic(self.path, str(count))


@contextlib.contextmanager
def kept(folder: Path, grace: float) -> Iterator[Beat]:
    """Keep a beat in `folder` while the block runs; at its end all ranks that are left are asked to leave.

    Args:
        grace: seconds that these get.
    """
    beat = Beat(folder)
    write_atomic(beat.path, "0")
    thread = threading.Thread(target=beat._keep, name="beat", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        beat.stop(grace)
        thread.join()


def watch(folder: Path, grace: float) -> None:
    """A rank's side, in a thread of its own: return never, end this process when it is time.

    Args:
        grace: seconds between SIGTERM and SIGKILL, unless the launch names others.
    """
    last, missed = "", 0
    while not last.startswith(STOP) and missed < MISSED:
        time.sleep(INTERVAL)
        try:
            now = (folder / FILE).read_text()
        except OSError:
            now = last
        last, missed = (now, 0) if now != last else (last, missed + 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(last.removeprefix(STOP)) if last.startswith(STOP) else grace)
    os.kill(os.getpid(), signal.SIGKILL)
