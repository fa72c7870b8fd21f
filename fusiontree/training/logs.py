"""Log files of the ranks."""

import contextlib
import logging
from collections.abc import Iterator

from fusiontree.config import RunConfig
from fusiontree.distributed.collectives import World
from fusiontree.run.folder import LOGS


@contextlib.contextmanager
def log_to_file(config: RunConfig, world: World) -> Iterator[None]:
    """Send this rank's log, DeepSpeed's log and Python's warnings to ``logs/rank-N.log``, not to the console.

    Lines that a full disk rejects stay in the handler's buffer without a message: `JsonLines` reports the disk.
    """
    folder = config.run_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{world.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    root, engine_log = logging.getLogger(), logging.getLogger("DeepSpeed")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    engine_log.handlers = [handler]
    logging.raiseExceptions = False  # else each line for a full disk prints a traceback, also of wandb's log
    try:
        yield
    finally:
        logging.raiseExceptions = True
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
