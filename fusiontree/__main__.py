"""Entry point of ``fusiontree`` and ``python -m fusiontree``."""

import io
import os
import signal
import sys

from fusiontree.cli import main
from fusiontree.cli.stdout import results


def run() -> None:
    """Run the command line and exit with its code; SIGTERM cleans up like Ctrl-C."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a launched rank ignores it until it can save
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names and keys may be undecodable
    code = main(own_stdout=True)
    results().flush()
    sys.stdout.flush()
    sys.stderr.flush()
    if "deepspeed" in sys.modules:
        os._exit(code)  # torch's threads sometimes abort the interpreter's normal exit
    sys.exit(code)


if __name__ == "__main__":
    run()
