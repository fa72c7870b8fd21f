"""Options of an export. Free of torch."""

import re
from dataclasses import dataclass

from fusiontree.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`.

    Raises:
        UserError: `limit` is out of range.
    """

    dtype: str = "fp32"  # `fp32` or `bf16`, of all weights but the scan's state parameters, which stay fp32
    overwrite: bool = False  # replace an existing export at the output path
    max_shard_size: str = "5GB"  # of one weights file; a GB is 10^9 bytes
    trust: bool = False  # unpickle arbitrary objects in the checkpoint, which may execute code
    prune: str | None = None  # a plan's path, `auto` (the default plan), or a number of branches
    prune_heads: int = 0  # global key-value heads to prune, with their queries
    data: str | None = None  # dataset (folder or address) whose held-out rows measure the pruning; None: the run's own
    limit: int | None = None  # maximum number of those rows; None: all

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be at least 1")

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes.

        Raises:
            UserError: it is not a size.
        """
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMG]B)", self.max_shard_size.strip().upper())
        if found is None or float(found[1]) == 0:
            raise UserError(f"--max-shard-size is {self.max_shard_size!r}; give a size such as 5GB or 500MB")
        return int(float(found[1]) * _UNITS[found[2]])
