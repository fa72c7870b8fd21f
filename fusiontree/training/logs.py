"""Where a rank's log goes."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from fusiontree.config import RunConfig
from fusiontree.distributed.collectives import World
from fusiontree.run.folder import LOGS


class _FileHandler(logging.FileHandler):
    """Says nothing of a full disk, which whoever writes more does: what it holds back is written later."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextlib.contextmanager
def log_to_file(config: RunConfig, world: World) -> Iterator[None]:
    """Send this rank's log, DeepSpeed's and Python's warnings to ``logs/rank-N.log``: the console is for progress."""
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
