"""The learning rate, a pure function of the step."""

import math

from fusiontree.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up to `peak`, then constant or a cosine (arXiv 1608.03983).

    The cosine ends at ``min_lr_ratio * peak`` with the last update.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = schedule.steps - 1 - schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine)
