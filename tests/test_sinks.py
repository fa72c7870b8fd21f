"""Figures reach the configured trackers; a tracker that is missing, fails or hangs costs one line of output."""

import contextlib
import json
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fusiontree.config import RunConfig, load_config
from fusiontree.errors import RunError
from fusiontree.run.records import read_metrics
from fusiontree.training import metrics as metrics_module
from fusiontree.training import tracker as tracker_module
from fusiontree.training.metrics import Metrics
from fusiontree.training.sinks import Histogram, TensorBoardSink
from fusiontree.training.tracker import open_trackers

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


def test_tensorboard_replaces_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = run_config(tmp_path)
    for resumed_step, steps in ((None, range(1, 5)), (2, range(3, 6))):
        sink = TensorBoardSink(config, resumed_step)
        sink.start()
        for step in steps:
            sink.log(step, {"loss": 10.0 * step + (0 if resumed_step is None else 1)})
        sink.close()
    assert events(tmp_path / "r" / "tensorboard")["loss"] == [(1, 10), (2, 20), (3, 31), (4, 41), (5, 51)]


def test_tensorboard_shows_a_histogram(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(run_config(tmp_path), None)
    sink.start()
    sink.log(7, {"gate/layer_00": HISTOGRAM})
    sink.close()
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    read.Reload()
    (event,) = read.Histograms("gate/layer_00")
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (7, 4, 0.125 + 3 * 0.625)
    assert event.histogram_value.bucket == [1, 0, 3]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_tracker_prints_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert open_trackers(run_config(tmp_path, f"logging.{name}=true"), None, None) == []
    assert capsys.readouterr().err == (
        f"{name} is not installed, so no metrics are sent to it; install it: pip install 'fusiontree[{name}]'\n"
    )


def test_no_tracker_is_opened_by_default(tmp_path: Path) -> None:
    assert open_trackers(run_config(tmp_path), None, None) == []


# --- trackers that fail ----------------------------------------------------------------------------------------------


def never_returns(*_: object, **__: object) -> None:
    threading.Event().wait()


def fails(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class FakeWandb(types.ModuleType):
    """A stand-in for wandb whose parts a test replaces."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, object]] = []
        self.online: Callable[..., None] = lambda: None  # called by an online start
        self.run_log: Callable[[dict], None] = lambda figures: None
        self.run_finish: Callable[[], None] = lambda: None
        self.api = types.SimpleNamespace(api_key=None)
        self.bad_project = ""

    def Settings(self, **values: object) -> dict:  # noqa: N802
        return values

    def setup(self, settings: object) -> None: ...

    def teardown(self) -> None:
        self.calls.append(("teardown", None))

    def init(self, mode: str, **options: object) -> object:
        self.calls.append((mode, options["id"]))
        if mode not in ("online", "offline"):
            raise ValueError(f"mode {mode}")
        if mode == "online":
            self.online()
        if options["project"] == self.bad_project:
            raise ValueError("Invalid project name")

        def log(figures: dict) -> None:
            self.run_log(figures)
            self.calls.append(("log", figures["step"]))

        return types.SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=log,
            finish=lambda: (self.run_finish(), self.calls.append(("finish", 0))),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "1234")  # restored after a start that removes wandb's variables
    return fake


def track(tmp_path: Path, steps: int = 3, error: Exception | None = None) -> str | None:
    """Record `steps` updates with wandb and end with `error`; return the id for checkpoints."""
    with contextlib.suppress(RunError), Metrics(run_config(tmp_path, "logging.wandb=true"), None, None) as metrics:
        for step in range(1, steps + 1):
            metrics.record({"step": step, "tokens": 8, **UPDATE})
        if error is not None:
            raise error
    assert len(read_metrics(tmp_path / "r")) == steps
    return metrics.wandb_id


def test_a_start_that_fails_is_one_line_and_continues_offline(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wandb.online = fails(ConnectionError("no route\nto host"))
    run_id = track(tmp_path)
    assert wandb.calls == [
        *(("online", run_id), ("teardown", None), ("offline", run_id)),
        *(("log", 1), ("log", 2), ("log", 3), ("finish", 0)),
    ]
    folder = tmp_path / "r" / "wandb"
    assert tracker_lines(capsys) == [
        f"wandb: ConnectionError: no route to host; recording offline in {folder}, for `wandb sync`"
    ]


@pytest.mark.parametrize(
    ("mode", "starts"), [("Online", ["online"]), (" OFFLINE", ["offline"]), ("on", ["on", "offline"])]
)
def test_the_mode_may_be_in_any_case(
    wandb: FakeWandb, mode: str, starts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    track(tmp_path)
    assert [name for name, _ in wandb.calls if name.startswith("o")] == starts


def test_a_project_that_wandb_rejects_is_replaced_offline(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    wandb.bad_project = "a/b"
    track(tmp_path)
    assert [name for name, _ in wandb.calls if name != "teardown"] == [
        "online",
        "offline",
        "offline",
        *["log"] * 3,
        "finish",
    ]


@pytest.mark.parametrize("part", ["online", "run_log", "run_finish"])
def test_a_hanging_tracker_delays_the_run_by_a_bounded_time(
    wandb: FakeWandb, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(metrics_module, "END_SECONDS", 0.2)
    setattr(wandb, part, never_returns)
    track(tmp_path)  # returns: no record waits, and the end waits for 0.2 s
    assert tracker_lines(capsys) == ["wandb: it has not finished in time, so its record may lack the last figures"]


def test_a_failed_run_waits_for_its_trackers_only_briefly(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(metrics_module, "STOP_SECONDS", 0.2)
    wandb.run_finish = never_returns
    track(tmp_path, error=RunError("stopped by SIGTERM"))
    assert len(tracker_lines(capsys)) == 1


@pytest.mark.parametrize("part", ["run_log", "run_finish"])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectionResetError("Connection lost"), "ConnectionResetError: Connection lost"),
        (OSError(28, "No space left on device"), "OSError: No space left on device"),
        (TypeError("bad\nprotobuf"), "TypeError: bad protobuf"),
        (SystemExit(1), "SystemExit: 1"),
    ],
)
def test_a_failing_tracker_is_reported_once_and_dropped(
    wandb: FakeWandb, part: str, error: BaseException, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    setattr(wandb, part, fails(error))
    track(tmp_path)
    assert tracker_lines(capsys) == [f"wandb: {cause}; no more metrics are sent to it"]


def test_a_tracker_that_falls_behind_is_dropped_at_a_bound(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_QUEUED", 5)
    wandb.online = never_returns
    track(tmp_path, steps=8)
    assert tracker_lines(capsys) == ["wandb: it is 5 updates behind; no more metrics are sent to it"]


def test_a_broken_package_is_one_line(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "WandbSink", fails(RuntimeError("protobuf is too old")))
    track(tmp_path)
    (line,) = tracker_lines(capsys)
    assert line.startswith("wandb cannot be imported (RuntimeError: protobuf is too old), so no metrics are sent")


def test_tensorboard_in_a_folder_that_cannot_be_created_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    config = run_config(tmp_path, "logging.tensorboard=true")
    (config.run_dir / "tensorboard").write_text("a file")
    with Metrics(config, None, None) as metrics:
        metrics.record({"step": 1, "tokens": 8, **UPDATE})
    (line,) = tracker_lines(capsys)
    assert line == "TensorBoard: FileExistsError: File exists; no more metrics are sent to it"


def test_tensorboard_on_a_full_disk_is_dropped_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """TensorBoard writes on a thread of its own, whose exception Python would print."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # restored after the test
    monkeypatch.setattr(RecordWriter, "write", fails(OSError(28, "No space left on device")))
    with Metrics(run_config(tmp_path, "logging.tensorboard=true"), None, None) as metrics:
        metrics.record({"step": 1, "tokens": 8, **UPDATE})
    assert tracker_lines(capsys) == ["TensorBoard: OSError: No space left on device; no more metrics are sent to it"]


def tracker_lines(capsys: pytest.CaptureFixture) -> list[str]:
    """Return the lines of standard error other than the progress line."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
