"""Schedules as pure functions of the step: a resumed run continues with the same values."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fusiontree.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up to `peak`, then by kind.

    `cosine` decays along half a cosine (arXiv 1608.03983). `wsd` stays at the peak until its last `decay` updates and
    then decays as ``1 - sqrt(share of these updates done)`` (arXiv 2405.18392). `constant` stays at the peak. A decay
    reaches ``min_lr_ratio * peak`` with the last update.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        done = (step + 1 - (schedule.steps - schedule.decay)) / schedule.decay
        share = 1 - math.sqrt(min(1.0, max(0.0, done)))
    else:
        done = (step - schedule.warmup_steps) / max(1, schedule.steps - 1 - schedule.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)


def set_learning_rates(
    groups: Sequence[dict[str, Any]], peaks: Sequence[float], schedule: ScheduleConfig, step: int
) -> None:
    """Set the learning rate of each of an optimizer's `groups` for update `step`; `peaks` are in their order."""
    for group, peak in zip(groups, peaks, strict=True):
        group["lr"] = learning_rate(schedule, peak, step)


def value_at(points: Mapping[int, float], step: int) -> float:
    """Return the value at `step`: linear between `points` (value by step), constant outside them."""
    steps = sorted(points)
    for before, after in pairwise(steps):
        if before <= step < after:
            done = (step - before) / (after - before)
            return points[before] + done * (points[after] - points[before])
    return points[steps[0]] if step < steps[0] else points[steps[-1]]
