"""What a person sees while a long command works: one progress bar, on standard error, alike in every command."""

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

console = Console(stderr=True, highlight=False, soft_wrap=True)


def progress_bar(of_bytes: bool = False) -> Progress:
    """A rich progress bar with counts, elapsed and remaining time; `of_bytes` shows sizes and MB/s instead of counts.

    A task may carry ``note`` (its last column), e.g. ``bar.add_task("pack", total=n, note="")``. Where standard error
    is no terminal, nothing is drawn.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
