"""Non-finite updates are skipped or rolled back; a hung step ends the job with every rank's stacks."""

import itertools
import json
import math
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
from conftest import cli, counting_dataset, metrics, settings
from test_training import plain_losses

from fusiontree.checkpoint import store
from fusiontree.config import HealthConfig, load_config
from fusiontree.data import remote
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream, single_source_recipe
from fusiontree.distributed.collectives import World
from fusiontree.run import incidents
from fusiontree.run.folder import GATES_FILE, list_checkpoints
from fusiontree.training.health import Health, Watchdog, robust_score
from fusiontree.training.step import Update

ROWS = 8  # per step of the micro run
SMALLER = {"model__hidden_size": 32, "validation__every": 0, "checkpoint__keep_last": 9, "batch__micro_rows": 1}


# --- judging ---------------------------------------------------------------------------------------------------------


def update(loss: float, norm: float = 1.0, skipped: bool = False) -> Update:
    return Update(loss, False, torch.tensor(loss), norm, torch.zeros(1, 1), {}, skipped, stop=False)


def test_consecutive_skipped_updates_are_counted_and_their_rows_kept() -> None:
    health = Health(HealthConfig(max_bad_steps=3))
    assert health.judge(update(math.nan, math.inf, True), (0, 8)).action == "continue"
    assert health.judge(update(2.0), (8, 16)) is None
    assert "gradient norm is inf" in health.judge(update(2.0, math.inf, True), (16, 24)).message
    restored = Health(HealthConfig(max_bad_steps=3))
    restored.restore(json.loads(json.dumps(health.to_json())))
    for judge in (health, restored):
        assert judge.judge(update(math.nan, math.inf, True), (24, 32)).action == "continue"
        trouble = judge.judge(update(math.nan, math.inf, True), (32, 40))
        assert (trouble.kind, trouble.action, trouble.rows) == ("skipped_update", "rollback", (16, 40))
        assert "loss is nan" in trouble.message
        assert judge.skipped == 4


@pytest.mark.parametrize(("on_spike", "action"), [("ignore", "continue"), ("rollback", "rollback"), ("stop", "stop")])
def test_a_spike_is_a_loss_far_above_the_recent_ones(on_spike: str, action: str) -> None:
    health = Health(HealthConfig(spike_window=16, on_spike=on_spike))
    draw = random.Random(0)
    assert health.judge(update(50.0), (0, 8)) is None  # too few losses to compare with
    for _ in range(200):
        assert health.judge(update(3 + draw.gauss(0, 0.05)), (0, 8)) is None
    assert health.judge(update(1.0), (0, 8)) is None  # a drop is no spike
    trouble = health.judge(update(4.5), (8, 16))
    assert (trouble.kind, trouble.action, trouble.rows) == ("loss_spike", action, (8, 16))


def test_the_robust_score_counts_standard_deviations_and_ignores_outliers() -> None:
    draw = random.Random(0)
    values = [draw.gauss(5, 0.5) for _ in range(20_000)]
    assert robust_score(values, 6.5) == pytest.approx(3, rel=0.05)
    assert robust_score([*values, *[1000.0] * 500], 6.5) == pytest.approx(3, rel=0.1)
    assert robust_score([2.0] * 20, 2.05) == pytest.approx(5)  # equal values: the deviation is at least 0.5 %


# --- skipping rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_ranges_are_skipped_from_any_position_of_the_stream(workers: int, tmp_path: Path) -> None:
    sources = Sources({"": counting_dataset(tmp_path / "set", 100, 2)})

    def stream() -> TrainStream:
        return TrainStream(sources, single_source_recipe(3, 4 * 32, 32), 4, workers=workers)

    complete = stream()
    steps = [next(complete)[0].input_ids.tolist() for _ in range(12)]
    ranges = [(28, 32), (8, 16), (16, 20)]
    expected = [steps[i] for i in (0, 1, 5, 6, 8, 9)]
    at_once = stream()
    at_once.skip_ranges(ranges)
    rows = []
    for step in expected:
        assert next(at_once)[0].input_ids.tolist() == step
        rows.append(at_once.rows_consumed)
    again = stream()
    for i, step in enumerate(expected):
        position = again.rows_consumed
        again = stream()
        again.skip_ranges(ranges)
        again.seek(position)
        ahead = [again.rows_consumed_after(steps) for steps in range(len(expected) - i)]
        assert next(again)[0].input_ids.tolist() == step, i
        assert ahead == [consumed - 4 for consumed in rows[i:]]


# --- training --------------------------------------------------------------------------------------------------------


def poison(rank: int, steps: tuple[int, ...], stop_before: int | None = None) -> None:
    """Make one rank's loss infinite over the rows of `steps`; request a stop before step `stop_before`."""
    import signal

    from fusiontree.data.stream import TrainStream
    from fusiontree.distributed import signals
    from fusiontree.training.objective import Objective

    fetch, objective, current = TrainStream.__next__, Objective.combine, [0]

    def fetched(self: TrainStream) -> list:
        batches = fetch(self)
        current[0] = self.rows_consumed // ROWS - 1
        if current[0] + 1 == stop_before:
            signals.requested = lambda: signal.SIGTERM
        return batches

    def poisoned(self: Objective, *arguments: object) -> tuple:
        total, reported = objective(self, *arguments)
        if current[0] in steps and int(os.environ["RANK"]) == rank:  # only the loss: its gradient stays finite
            return total + math.inf, {**reported, "loss": reported["loss"] + math.inf}
        return total, reported

    TrainStream.__next__, Objective.combine = fetched, poisoned


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (2, 2), (3, 2)])
def test_a_non_finite_loss_skips_the_update_on_all_ranks(stage: int, size: int, shards: Path, tmp_path: Path) -> None:
    changes = {**SMALLER, "deepspeed": f"zero{stage}", "checkpoint__every": 1, "schedule__steps": 5}
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    said = ranks.run(words, tmp_path, size, setup=partial(poison, size - 1, (3,)))
    saved = [tmp_path / "r" / "checkpoints" / f"step-{step}" for step in (3, 4, 5)]
    before, after, later = map(store.read_weights, saved)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(before[name], later[name]) for name in before if name.endswith("proj.weight"))
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2, 3, 5]
    assert torch.isfinite(store.read_gates(saved[1])).all()
    (incident,) = incidents.read(tmp_path / "r")
    assert (incident["kind"], incident["step"], len(incident["rows"])) == ("skipped_update", 4, ROWS // size)
    row = incident["rows"][0]
    assert f"step 4: loss is inf: update skipped, 1 in a row; rows: {row['shard']} row {row['row']}" in said


def poison_and_damage(rank: int, steps: tuple[int, ...]) -> None:
    """Like `poison`, and damage the newest checkpoint before a rollback."""
    from fusiontree.training.trainer import Trainer

    poison(rank, steps)
    roll_back = Trainer._roll_back

    def damaged(self: Trainer, trouble: object) -> None:
        self.saver.wait()
        found = list_checkpoints(self.config.run_dir / "checkpoints")
        os.truncate(found[-1] / GATES_FILE, 10)
        roll_back(self, trouble)

    Trainer._roll_back = damaged


def test_a_rollback_reports_and_skips_a_damaged_checkpoint(shards: Path, tmp_path: Path) -> None:
    changes = {**SMALLER, "deepspeed": "zero0", "checkpoint__every": 2, "health__max_bad_steps": 2}
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    said = ranks.run(words, tmp_path, setup=partial(poison_and_damage, 0, (5, 6)))
    assert "step-6 is damaged and skipped: gates.safetensors does not match" in said
    assert [(line["kind"], line["step"]) for line in incidents.read(tmp_path / "r")][:4] == [
        *(("skipped_update", 6), ("skipped_update", 7), ("fallback", 6), ("rollback", 7))
    ]
    assert "rolled back from step 7 to 4" in said
    assert [line["step"] for line in metrics(tmp_path / "r")] == [*range(1, 9)]


@pytest.mark.parametrize(("stage", "size", "stop_before"), [(0, 1, None), (2, 1, 9), (3, 2, None)])
def test_consecutive_bad_updates_are_rolled_back_and_their_rows_skipped(
    stage: int, size: int, stop_before: int | None, shards: Path, tmp_path: Path
) -> None:
    changes = {**SMALLER, "deepspeed": f"zero{stage}", "checkpoint__every": 4, "health__max_bad_steps": 2}
    changes["validation__every"] = 100
    words = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    if stop_before is not None:  # a later job that resumes skips them too
        ranks.run(words, tmp_path, size, setup=partial(poison, 0, (5, 6), stop_before), code=75)
    ranks.run(words, tmp_path, size, setup=partial(poison, 0, (5, 6)))
    run = tmp_path / "r"
    expected, norms, _ = plain_losses(load_config(str(run / "config.yaml")), skipped=[(5 * ROWS, 7 * ROWS)])
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    kinds = [(line["kind"], line["step"]) for line in incidents.read(run)]
    assert kinds[:3] == [("skipped_update", 6), ("skipped_update", 7), ("rollback", 7)]
    assert store.read_state(run / "checkpoints" / "step-8")["left_out"] == [(5 * ROWS, 7 * ROWS)]
    known = ("shard", "row", "first_token")
    bad = [{key: row[key] for key in known} for line in incidents.read(run)[:2] for row in line["rows"]]
    for step in (4, 5, 7):  # no step contains the skipped rows
        rows = json.loads(cli("data", "at", run / "config.yaml", "--step", step, "--json").stdout)["rows"]
        assert not any({key: row[key] for key in known} in bad for row in rows), step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"health__on_bad": "stop"}, "step 6: loss is inf: update skipped, 1 in a row; rows: "),
        (
            {"checkpoint__every": 100},
            "step 6: loss is inf: update skipped, 1 in a row, and there is no checkpoint",
        ),
        ({}, "rolled back to "),
    ],
)
def test_persistent_trouble_stops_the_run_with_a_report(
    changes: dict, words: str, shards: Path, tmp_path: Path
) -> None:
    setting = {**SMALLER, "checkpoint__every": 4, "health__max_bad_steps": 1, "schedule__steps": 20, **changes}
    argv = ["train", "tiny", *settings(shards, tmp_path, name="r", **setting)]
    said = ranks.run(argv, tmp_path, setup=partial(poison, 0, tuple(range(5, 20))), code=1)
    assert (
        f"error: {words}" in said
        or words + str(tmp_path / "r" / "checkpoints" / "step-4") + " more than 3 times" in said
    )


# --- hanging ---------------------------------------------------------------------------------------------------------


def wait_for(release: Path) -> None:
    while not release.exists():
        time.sleep(0.05)


def hang(rank: int, step: int, release: Path) -> None:
    """Hang one rank between the forward and the backward pass of a step, until the file `release` exists."""
    from fusiontree.training.step import TrainingStep

    update, backward, current = TrainingStep.update, TrainingStep._backward, [0]

    def updated(self: TrainingStep, batches: list, number: int, *arguments: object) -> object:
        current[0] = number
        return update(self, batches, number, *arguments)

    def asleep(self: TrainingStep, *arguments: object) -> None:
        if current[0] == step and int(os.environ["RANK"]) == rank:
            wait_for(release)
        backward(self, *arguments)

    TrainingStep.update, TrainingStep._backward = updated, asleep


def test_the_watchdogs_limit_is_a_multiple_of_the_median_and_at_least_hang_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticks = itertools.count()
    watchdog = Watchdog(HealthConfig(hang_factor=7, hang_seconds=20), tmp_path, World(0, 1, torch.device("cpu")))
    for seconds, limits in ((2, [math.inf] * 4 + [20]), (4, [20, 20, 20, 20, 21, 28])):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: seconds * next(ticks))
        for limit in limits:
            with watchdog.step(1):
                pass
            assert watchdog.limit == limit


def test_waiting_for_a_remote_address_stays_below_the_hang_limit() -> None:
    delays = [remote.FIRST_DELAY * 2**attempt for attempt in range(remote.ATTEMPTS - 1)]
    assert remote.ATTEMPTS * remote.TIMEOUT + sum(delays) < HealthConfig().hang_seconds


def test_a_hung_step_writes_all_stacks_and_ends_the_job(shards: Path, tmp_path: Path) -> None:
    changes = {**SMALLER, "schedule__steps": 20, "health__hang_seconds": 6}
    argv = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    job = ranks.start(argv, tmp_path, 2, partial(hang, 1, 8, tmp_path / "never"))
    assert job.codes() == [76, 76], job.output()
    stacks = [(tmp_path / "r" / "logs" / f"stacks-rank-{rank}.txt").read_text() for rank in range(2)]
    assert all("trainer.py" in stack for stack in stacks)
    assert "in asleep" in stacks[1]
    assert ["in backward" in stack for stack in stacks] == [True, False]
    assert "rank 0: step 9 has taken more than" in job.output()
    assert [(line["kind"], line["step"], line["silent"]) for line in incidents.read(tmp_path / "r")] == [
        ("hang", 8, [])
    ]


def hang_in_a_write(rank: int, release: Path) -> None:
    """Hang one rank's disk writes until the file `release` exists."""
    from fusiontree.checkpoint import saver

    write = saver._write_files

    def asleep(*arguments: object) -> object:
        if int(os.environ["RANK"]) == rank:
            wait_for(release)
        return write(*arguments)

    saver._write_files = asleep


def test_a_rank_that_hangs_in_a_save_times_out(shards: Path, tmp_path: Path) -> None:
    changes = {**SMALLER, "health__timeout_seconds": 4}
    argv = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    check_times_out(ranks.start(argv, tmp_path, 2, partial(hang_in_a_write, 1, tmp_path / "release")), 4, tmp_path)


def check_times_out(job: ranks.Job, seconds: int, folder: Path) -> None:
    """Check that rank 0 gives up while rank 1 hangs; release rank 1, which then has lost its peer."""
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 76, job.output()
    assert job.processes[1].is_alive()
    assert f"a rank has waited {seconds} s (health.timeout_seconds) for the others" in job.output()
    (folder / "release").touch()
    assert job.codes() == [76, 1]


def test_a_rank_that_hangs_before_steps_are_timed_times_out(shards: Path, tmp_path: Path) -> None:
    """The hang is in a process group created by DeepSpeed, which a timeout set at the start does not reach."""
    changes = {**SMALLER, "deepspeed": "zero2", "health__timeout_seconds": 3}
    argv = ["train", "tiny", *settings(shards, tmp_path, name="r", **changes)]
    check_times_out(ranks.start(argv, tmp_path, 2, partial(hang, 1, 2, tmp_path / "release")), 3, tmp_path)
