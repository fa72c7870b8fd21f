"""The `throughput` task: prefill, time to the first token, decoding."""

from typing import Any

from fusiontree.evaluate.subject import Subject
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding

STEPS = 32  # timed decoding steps after each prompt
TOTAL_NEW_TOKENS = UNTIMED_STEPS + STEPS  # generated after each prompt, timed or not
PREFILLS = 5  # timed per prompt


def throughput(subject: Subject) -> dict[str, Any]:
    """Measure prefill and decoding of one row of held-out text at each length, as `fusiontree bench decode` does."""
    model = subject.model
    figures = {
        f"{length} tokens": measure_decoding(model, 1, length, STEPS, PREFILLS, subject.text[:length])
        for length in subject.lengths
    }
    return {"steps": STEPS, "kernels": dict(model.kernels.names), "by_length": figures}
