"""Options of tokenizer training and of the dataset builder, checked when they are created."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fusiontree.data.packing import check_row_len
from fusiontree.errors import UserError

MAX_CHARS = 1 << 26  # characters; the longest books have a few million
_LEAST_RECORD_BYTES = 1 << 26  # a JSON line's other keys may be longer than its text


def require_workers(workers: int) -> None:
    """Raise UserError unless there is at least one worker."""
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")


@dataclass(frozen=True)
class InputOptions:
    """Selection of input files and extraction of documents from them.

    Raises:
        UserError: the separator is empty, or the length limits exclude every document.
    """

    include: Sequence[str] = ()  # glob patterns; if any are given, a file must match one of them
    exclude: Sequence[str] = ()  # glob patterns; a file must match none of them
    text_key: str = "text"  # key (JSON) or column (Parquet) that contains the text
    separator: str | None = None  # separates documents in plain text; None: one document per file
    min_chars: int = 0  # shorter documents are dropped, in characters
    max_chars: int | None = None  # longer documents are dropped, in characters; None: MAX_CHARS

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("--doc-separator is empty; give the text between two documents, or omit the option")
        if self.min_chars < 0 or self.char_limit < max(1, self.min_chars):
            raise UserError(
                f"--min-chars {self.min_chars} and --max-chars {self.char_limit} exclude every document; "
                "give 0 <= min <= max and 1 <= max"
            )

    @property
    def char_limit(self) -> int:
        """Characters of the longest document that is kept."""
        return MAX_CHARS if self.max_chars is None else self.max_chars

    @property
    def record_bytes(self) -> int:
        """Bytes of a file, line, part or member above which it is skipped: UTF-8 has up to four per character."""
        return max(4 * self.char_limit, _LEAST_RECORD_BYTES)


@dataclass(frozen=True)
class BuildOptions:
    """Options of `data_tools.build.build_shards`.

    Raises:
        UserError: `holdout`, `workers` or `row_len` is out of range.
    """

    row_len: int = 32768  # tokens per packed row
    holdout: float = 0.02  # fraction of the documents in the validation split: 0 <= holdout < 1
    # spread: hold out documents at even distances; end: hold out the last fraction of the files, which keeps
    # neighboring documents in the same split
    holdout_from: Literal["spread", "end"] = "spread"
    dedup: bool = False  # drop a document whose text occurred earlier in the inputs
    eos: str | None = None  # end-of-document token, see `load_text_tokenizer`
    encoder: str = "auto"  # encoding library, see `Encoder`
    input: InputOptions = field(default_factory=InputOptions)
    workers: int = 1  # tokenizing processes
    overwrite: bool = False  # replace an existing dataset, and restart an interrupted build instead of refusing

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"--holdout is {self.holdout}; it must be at least 0 and below 1")
        require_workers(self.workers)
        check_row_len(self.row_len)
