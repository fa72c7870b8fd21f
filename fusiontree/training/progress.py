"""The progress line. In a narrow terminal the least important figures disappear first."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.text import Text

from fusiontree.console import console

PLAIN_INTERVAL = 10.0  # seconds between lines if the console is no terminal
_BAR = 20  # characters


class ProgressLine:
    """A bar and a line of figures, updated in place; without a terminal, a new line every `PLAIN_INTERVAL`."""

    def __init__(self, steps: int, done: int):
        """Prepare the line; `done`: how many of the run's `steps` updates are done."""
        self.steps = steps
        self.last_plain = 0.0
        self.progress = Progress(
            _WideBar(bar_width=_BAR), TextColumn("{task.fields[line]}", markup=False), console=console
        )
        self.task = self.progress.add_task("train", total=steps, completed=done, line="starting", wide=False)

    def start(self) -> None:
        """Start drawing."""
        if console.is_terminal:
            self.progress.start()

    def stop(self) -> None:
        """Stop drawing; the last line stays."""
        if self.progress.live.is_started:
            self.progress.stop()

    def show(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Show the figures of an update; `eta_s`: seconds to the end of the run."""
        parts = line_parts(figures, self.steps, eta_s)
        full = fit(parts, None)
        wide = len(full) + _BAR + 1 < console.width
        line = fit(parts, console.width - 1)
        self.progress.update(self.task, completed=figures["step"], line=line, wide=wide)
        if not console.is_terminal and time.monotonic() - self.last_plain > PLAIN_INTERVAL:
            self.last_plain = time.monotonic()
            console.print(full)


class _WideBar(BarColumn):
    """Bar that is drawn only if the figures leave room for it."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        return super().render(task) if task.fields["wide"] else Text()  # type: ignore[return-value]


def line_parts(figures: Mapping[str, float], steps: int, eta_s: float | None) -> list[tuple[int, str]]:
    """Return the parts of the line in order, each with its rank: parts of the highest rank disappear first."""
    parts = [
        (0, f"step {figures['step']:,}/{steps:,}"),
        (1, f"loss {figures['loss']:.3f}"),
        (8, f"ppl {_short(figures['perplexity'])}"),
        (7, f"lr {figures['lr']:.1e}"),
        (6, f"gate {figures['gate_mean']:.3f}"),
        (4, f"grad {_short(figures['grad_norm'])}"),
        (3, f"{figures['tokens_per_s']:,.0f} tokens/s"),
    ]
    if "mfu" in figures:
        parts.append((5, f"MFU {figures['mfu']:.1%}"))
    parts.append((9, f"{figures['memory_gib']:.1f} GiB"))
    if eta_s is not None:
        parts.append((2, f"ETA {timedelta(seconds=int(eta_s))}"))
    return parts


def fit(parts: Sequence[tuple[int, str]], width: int | None) -> str:
    """Join as many parts as fit into `width` characters (None: all), in order; drop those of the highest rank first."""
    kept = list(parts)
    while width is not None and len(kept) > 1 and len(_join(kept)) > width:
        kept.remove(max(kept))
    return _join(kept)


def _join(parts: Sequence[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


def _short(value: float) -> str:
    """Return `value` with three digits, in scientific notation outside 0.001 to 10,000."""
    return f"{value:,.3g}" if 0.001 <= value < 10_000 else f"{value:.1e}"
