"""Figures reach the configured trackers; a missing package costs one line of output."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fusiontree.config import RunConfig, load_config
from fusiontree.run.records import read_metrics
from fusiontree.training import sinks
from fusiontree.training.metrics import Metrics
from fusiontree.training.sinks import Histogram, TensorBoardSink, open_sinks

HISTOGRAM = Histogram([1, 0, 3], [0.0, 0.25, 0.5, 0.75])
UPDATE = {"loss": 1.0, "lr": 1e-3, "grad_norm": 0.1, "gate_mean": 0.5, "tokens_per_s": 10.0, "memory_gib": 0.1}


def run_config(output: Path, *words: str) -> RunConfig:
    config = load_config("tiny", [f"output={output}", "name=r", *words])
    config.run_dir.mkdir(exist_ok=True)
    return config


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every scalar in the event files of `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = run_config(tmp_path, "logging.tensorboard=true")
    with Metrics(config, None, None) as metrics:
        metrics.record({"step": 1, "tokens": 8, **UPDATE})
        metrics.record({"step": 1, "tokens": 8, "val_loss": 3.0, "val_loss/books": 2.0})
    found = events(tmp_path / "r" / "tensorboard")
    written: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            written.setdefault(name, []).append((line["step"], pytest.approx(value)))
    del written["step"]
    assert found == written


def test_a_tracker_that_cannot_write_is_reported_once_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class TensorBoardSink:
        def log(self, step: int, figures: object) -> None:
            raise OSError(28, "No space left on device")

    with Metrics(run_config(tmp_path), None, None) as metrics:
        metrics.sinks.append(TensorBoardSink())
        for step in (1, 2):
            metrics.record({"step": step, "tokens": 8, **UPDATE})
    assert len(read_metrics(tmp_path / "r")) == 2
    said = capsys.readouterr().err
    assert said.count("TensorBoard: No space left on device; no more metrics are sent to it") == 1


def test_tensorboard_replaces_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = run_config(tmp_path)
    for resumed_step, steps in ((None, range(1, 5)), (2, range(3, 6))):
        sink = TensorBoardSink(config, resumed_step)
        for step in steps:
            sink.log(step, {"loss": 10.0 * step + (0 if resumed_step is None else 1)})
        sink.close()
    assert events(tmp_path / "r" / "tensorboard")["loss"] == [(1, 10), (2, 20), (3, 31), (4, 41), (5, 51)]


def test_tensorboard_shows_a_histogram(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(run_config(tmp_path), None)
    sink.log(7, {"gate/layer_00": HISTOGRAM})
    sink.close()
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    read.Reload()
    (event,) = read.Histograms("gate/layer_00")
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (7, 4, 0.125 + 3 * 0.625)
    assert event.histogram_value.bucket == [1, 0, 3]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_tracker_prints_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    monkeypatch.setattr(sinks, "console", console)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert open_sinks(run_config(tmp_path, f"logging.{name}=true"), None, None) == []
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == (
        f"{name} is not installed, so no metrics are sent to it; install it: pip install 'fusiontree[{name}]'\n"
    )


def test_no_tracker_is_opened_by_default(tmp_path: Path) -> None:
    assert open_sinks(run_config(tmp_path), None, None) == []
