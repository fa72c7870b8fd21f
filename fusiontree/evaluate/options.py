"""Options of an evaluation. Free of torch."""

from dataclasses import dataclass
from pathlib import Path

from fusiontree.errors import UserError

TASK_NAMES = ("perplexity", "passkey", "needle", "recall", "throughput")
LONGEST = 2**24  # tokens of a prompt, longer than any training row of the presets


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Raises:
        UserError: a value is out of range.
    """

    data: str  # folder or address; perplexity and haystacks use held-out rows, the n-gram baselines training rows
    lengths: tuple[int, ...] = ()  # prompt lengths, tokens; empty: the length of the model's training rows
    seq_len: int | None = None  # tokens per row of perplexity; None: as in training
    limit: int | None = None  # maximum number of held-out rows; None: all
    samples: int = 5  # prompts per cell of a retrieval task
    output: Path | None = None  # folder to create for the results as JSON and the heat maps as PNG
    overwrite: bool = False  # replace existing results at `output`

    def __post_init__(self) -> None:
        numbers = [("--seq-len", self.seq_len), ("--limit", self.limit), ("--samples", self.samples)]
        for name, value in [*numbers, *(("--lengths", length) for length in self.lengths)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.lengths and max(self.lengths) > LONGEST:
            raise UserError(f"--lengths is {max(self.lengths)}; it must be at most {LONGEST:,}")
