"""Where a rank's log goes."""

import contextlib
import logging
from collections.abc import Iterator

from fusiontree.config import RunConfig
from fusiontree.distributed import World


@contextlib.contextmanager
def log_to_file(config: RunConfig, world: World) -> Iterator[None]:
    """Send this rank's log, DeepSpeed's and Python's warnings to ``logs/rank-N.log``: the console is for progress."""
    folder = config.run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{world.rank}.log")
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
