"""Schedules are pure functions of the step, settable in steps or tokens, and inconsistent ones are refused."""

import math

import pytest

from fusiontree.config import ScheduleConfig, config_differences, load_config
from fusiontree.errors import UserError
from fusiontree.training.schedule import learning_rate, value_at

PEAK = 0.5


def curve(**settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(schedule, PEAK, step) for step in range(schedule.steps)]


def test_every_kind_warms_up_in_equal_steps_to_the_peak() -> None:
    for kind in ("cosine", "wsd", "constant"):
        rates = curve(kind=kind, steps=20, warmup_steps=4)
        assert rates[:5] == pytest.approx([PEAK * share for share in (0.25, 0.5, 0.75, 1, 1)])
        assert max(rates) == PEAK


def test_constant_stays_at_the_peak_and_cosine_halves_midway() -> None:
    assert curve(kind="constant", steps=9, warmup_steps=2)[2:] == [PEAK] * 7
    rates = curve(kind="cosine", steps=13, warmup_steps=2, min_lr_ratio=0.0)
    assert rates[7] == pytest.approx(PEAK / 2)
    assert rates[-1] == pytest.approx(0)
    assert curve(kind="cosine", steps=13, warmup_steps=2, min_lr_ratio=0.1)[-1] == pytest.approx(0.1 * PEAK)


def test_wsd_stays_at_the_peak_and_decays_by_the_square_root_at_the_end() -> None:
    rates = curve(kind="wsd", steps=20, warmup_steps=2, decay_steps=4, min_lr_ratio=0.2)
    assert rates[2:16] == [PEAK] * 14
    expected = [PEAK * (0.2 + 0.8 * (1 - math.sqrt(done / 4))) for done in (1, 2, 3, 4)]
    assert rates[16:] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0.2 * PEAK)
    assert curve(kind="wsd", steps=20) == curve(kind="wsd", steps=20, decay_steps=4)


def test_lengths_in_tokens_equal_those_in_steps() -> None:
    in_steps = ["schedule.kind=wsd", "schedule.steps=1000", "schedule.warmup_steps=11", "schedule.decay_steps=200"]
    in_tokens = [
        *("schedule.kind=wsd", f"schedule.tokens={1000 * 4096}", f"schedule.warmup_tokens={10 * 4096 + 1}"),
        f"schedule.decay_tokens={200 * 4096}",
    ]
    one, other = load_config("tiny", in_steps), load_config("tiny", in_tokens)
    assert one.schedule == other.schedule
    assert config_differences(one, other) == []
    assert load_config("tiny", [*in_tokens, "schedule.steps=50", "schedule.decay_steps=9"]).schedule.steps == 50
    assert (
        load_config("tiny", ["schedule.tokens=8192", "batch.tokens=1024", "schedule.warmup_steps=0"]).schedule.steps
        == 8
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["schedule.tokens=40960"],
            "schedule: warmup_steps 10 is not below steps 10: the schedule would end during its warm-up; lower "
            "warmup_steps to 9 or raise steps to 11",
        ),
        (["schedule.warmup_tokens=409600"], "schedule: warmup_steps 100 is not below steps 100"),
        (
            ["schedule.kind=wsd", "schedule.decay_steps=95"],
            "warmup_steps 10 and decay_steps 95 together exceed steps 100; lower one of them or raise steps",
        ),
        (["schedule.decay_steps=9"], "decay_steps needs kind wsd, but kind is cosine"),
        (["schedule.tokens=many"], "schedule.tokens is 'many'"),
        (["schedule.steps=null"], "schedule.steps is missing"),
    ],
)
def test_inconsistent_schedules_are_refused_with_the_numbers(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("decay", [None, 7])
def test_a_refusal_names_the_smallest_number_of_steps_that_fits(kind: str, decay: int | None) -> None:
    words = [f"schedule.kind={kind}", *([f"schedule.decay_steps={decay}"] if decay and kind == "wsd" else [])]
    for warmup in (1, 2, 4, 5, 6, 9, 80, 97):
        words_now = [*words, f"schedule.warmup_steps={warmup}"]
        with pytest.raises(UserError, match=r"raise steps to \d+") as caught:
            load_config("tiny", [*words_now, "schedule.steps=1"])
        steps = int(str(caught.value).rpartition("raise steps to ")[2].split()[0])
        assert load_config("tiny", [*words_now, f"schedule.steps={steps}"]).schedule.steps == steps
        with pytest.raises(UserError, match=f"raise steps to {steps}"):
            load_config("tiny", [*words_now, f"schedule.steps={steps - 1}"])


def test_a_length_given_twice_in_one_file_is_refused(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("base: tiny\nschedule: {steps: 30, tokens: 1000000}\n")
    with pytest.raises(UserError, match=r"schedule.steps 30 and schedule.tokens 1000000 are both given; remove one"):
        load_config(str(path))


def test_values_are_interpolated_linearly_between_points() -> None:
    points = {10: 1.0, 20: 3.0, 40: 0.0}
    assert [value_at(points, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 2, 3, 1.5, 0, 0]
    assert value_at({0: 0.5}, 7) == 0.5
