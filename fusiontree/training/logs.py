"""Log files of the ranks."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from fusiontree.config import RunConfig
from fusiontree.distributed.collectives import World
from fusiontree.run.folder import LOGS


class _FileHandler(logging.FileHandler):
    """File handler that ignores a full disk: it keeps the lines in its buffer and `JsonLines` reports the problem."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextlib.contextmanager
def log_to_file(config: RunConfig, world: World) -> Iterator[None]:
    """Send this rank's log, DeepSpeed's log and Python's warnings to ``logs/rank-N.log``, not to the console."""
    folder = config.run_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(folder / f"rank-{world.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    root, engine_log = logging.getLogger(), logging.getLogger("DeepSpeed")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    engine_log.handlers = [handler]
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
