"""The line that shows how a run goes: what matters most stays where the terminal is narrow."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.text import Text

from fusiontree.console import console

PLAIN_INTERVAL = 10.0  # seconds between lines where the console is no terminal
_BAR = 20  # characters


class ProgressLine:
    """A bar and a line of figures that change in place; where the console is no terminal, a line now and then."""

    def __init__(self, steps: int, done: int):
        """A run of `steps` updates of which `done` are done."""
        self.steps = steps
        self.last_plain = 0.0
        self.progress = Progress(_WideBar(bar_width=_BAR), TextColumn("{task.fields[line]}"), console=console)
        self.task = self.progress.add_task("train", total=steps, completed=done, line="starting", wide=False)

    def start(self) -> None:
        """Begin to draw."""
        if console.is_terminal:
            self.progress.start()

    def stop(self) -> None:
        """Leave the last line as it is."""
        if self.progress.live.is_started:
            self.progress.stop()

    def show(self, figures: Mapping[str, float], eta_s: float | None = None) -> None:
        """Show the figures of an update; `eta_s`: seconds to the end of the run."""
        parts = line_parts(figures, self.steps, eta_s)
        whole = fit(parts, None)
        wide = len(whole) + _BAR + 1 < console.width
        line = fit(parts, console.width - 1)
        self.progress.update(self.task, completed=figures["step"], line=line, wide=wide)
        if not console.is_terminal and time.monotonic() - self.last_plain > PLAIN_INTERVAL:
            self.last_plain = time.monotonic()
            console.print(whole)


class _WideBar(BarColumn):
    """The bar, where the figures leave room for it."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        return super().render(task) if task.fields["wide"] else Text()  # type: ignore[return-value]


def line_parts(figures: Mapping[str, float], steps: int, eta_s: float | None) -> list[tuple[int, str]]:
    """The parts of the line in order, each with its rank: the higher, the sooner it goes."""
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
    """As many parts as `width` characters hold (None: all), joined in order; those of the highest rank go first."""
    kept = list(parts)
    while width is not None and len(kept) > 1 and len(_join(kept)) > width:
        kept.remove(max(kept))
    return _join(kept)


def _join(parts: Sequence[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


def _short(value: float) -> str:
    """Three digits, and no column of zeros where a run diverges."""
    return f"{value:,.3g}" if 0.001 <= value < 10_000 else f"{value:.1e}"
