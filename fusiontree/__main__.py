"""The process that a user starts: ``fusiontree`` or ``python -m fusiontree``."""

import os
import sys

from fusiontree.cli import main


def run() -> None:
    """Run the command line and leave with its exit code."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "deepspeed" in sys.modules:
        os._exit(code)  # all is written and said; threads of torch now and then abort the interpreter's own way out
    sys.exit(code)


if __name__ == "__main__":
    run()
