"""The progress line keeps the most important figures at any width."""

import io
import math

import pytest
from rich.console import Console

from fusiontree.training import progress
from fusiontree.training.progress import ProgressLine, fit, line_parts

FIGURES = {
    "step": 1234,
    "loss": 2.3456,
    "perplexity": 10.44,
    "lr": 1e-3,
    "gate_mean": 0.523,
    "grad_norm": 0.531,
    "tokens_per_s": 46_700.4,
    "mfu": 0.431,
    "memory_gib": 33.4,
}
FULL = (
    "step 1,234/5,000  loss 2.346  ppl 10.4  lr 1.0e-03  gate 0.523  grad 0.531  46,700 tokens/s  MFU 43.1%  "
    "33.4 GiB  ETA 1:23:45"
)


def parts(**changes: float) -> list[tuple[int, str]]:
    return line_parts({**FIGURES, **changes}, 5000, 5025)


def test_a_wide_terminal_shows_all_parts() -> None:
    assert fit(parts(), None) == fit(parts(), len(FULL)) == FULL


def test_parts_disappear_by_rank_as_the_terminal_narrows() -> None:
    assert fit(parts(), 80) == "step 1,234/5,000  loss 2.346  grad 0.531  46,700 tokens/s  ETA 1:23:45"
    assert fit(parts(), 40) == "step 1,234/5,000  loss 2.346"
    assert fit(parts(), 1) == "step 1,234/5,000"
    for width in range(16, len(FULL)):
        assert len(fit(parts(), width)) <= width


def test_a_device_without_a_known_peak_shows_no_mfu() -> None:
    assert "MFU" not in fit(line_parts({k: v for k, v in FIGURES.items() if k != "mfu"}, 5000, None), None)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e304])
def test_a_diverging_run_still_has_a_line(value: float) -> None:
    assert len(fit(parts(loss=value, perplexity=value, grad_norm=value), 60)) <= 60


@pytest.mark.parametrize(("width", "bar"), [(50, False), (200, True)])
def test_the_line_fits_the_terminal(width: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, soft_wrap=True)
    monkeypatch.setattr(progress, "console", console)
    line = ProgressLine(5000, 0)
    with line.progress:
        line.show(FIGURES, 5025)
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert ("━" in drawn) is bar
    assert line.progress.tasks[0].fields["line"] in drawn  # complete: rich has not truncated it


def test_a_log_file_gets_full_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    monkeypatch.setattr(progress, "console", console)
    line = ProgressLine(5000, 0)
    line.start()
    line.show(FIGURES, 5025)
    line.show({**FIGURES, "step": 1235}, 5024)
    line.stop()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == FULL + "\n"
