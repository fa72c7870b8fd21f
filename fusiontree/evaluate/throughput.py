"""How fast the model answers: prompts taken in, the first token, tokens one by one."""

from typing import Any

from fusiontree.evaluate.subject import Subject
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding

STEPS = 32  # tokens made, and timed, behind each prompt
TOTAL_NEW_TOKENS = UNTIMED_STEPS + STEPS  # tokens made behind each prompt in all
PREFILLS = 5  # times that each prompt is taken in


def throughput(subject: Subject) -> dict[str, Any]:
    """Prefill and decoding at each length, one row, as `fusiontree bench decode` measures them, of held-out text."""
    model = subject.model
    figures = {
        f"{length} tokens": measure_decoding(model, 1, length, STEPS, PREFILLS, subject.text[:length])
        for length in subject.lengths
    }
    return {"steps": STEPS, "kernels": dict(model.kernels.names), "by_length": figures}
