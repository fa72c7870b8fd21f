"""The console on standard error, and the progress bar that all commands share."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# without markup and emoji: names and paths may contain brackets and colons
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def progress_bar(in_bytes: bool = False) -> Progress:
    """Return a rich progress bar with counts, elapsed and remaining time.

    Each task needs a ``note``, its last column, e.g. ``bar.add_task("pack", total=n, note="")``. Nothing is drawn if
    standard error is not a terminal.

    Args:
        in_bytes: show sizes and MB/s in place of counts.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
