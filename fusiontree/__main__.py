"""The process that a user starts: ``fusiontree`` or ``python -m fusiontree``."""

import io
import os
import signal
import sys

from fusiontree.cli import main


def run() -> None:
    """Run the command line and leave with its exit code; told to end, it tidies up as at Ctrl-C."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a launched rank ignores it until it can answer
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and keys need be no text, here or anywhere
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "deepspeed" in sys.modules:
        os._exit(code)  # all is written and said; threads of torch now and then abort the interpreter's own way out
    sys.exit(code)


if __name__ == "__main__":
    run()
