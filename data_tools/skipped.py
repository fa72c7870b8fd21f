"""Accounting of the inputs: accepted documents, and skipped files and documents with their reasons."""

from dataclasses import dataclass, field
from typing import Any

from data_tools.inputs import SkippedInput
from data_tools.readers import TOO_LONG, TOO_SHORT, Record

_MAX_PLACES = 10  # listed places per file and reason
_MAX_REASONS = 20  # distinct reasons per file; a file of random lines could have one per line
_OTHER = "other reasons"


@dataclass
class SkipReport:
    """Counts of accepted and skipped records."""

    documents: int = 0  # accepted
    filtered: dict[str, int] = field(default_factory=lambda: {TOO_SHORT: 0, TOO_LONG: 0})  # records by limit
    skipped: dict[tuple[str, str], SkippedInput] = field(default_factory=dict)  # by file and reason
    reasons: dict[str, int] = field(default_factory=dict)  # distinct reasons by file

    def add_record(self, record: Record, reason: str) -> None:
        """Count a record that is not a document."""
        if reason in self.filtered:
            self.filtered[reason] += 1
            return
        if (record.file, reason) not in self.skipped:
            known = self.reasons.get(record.file, 0)
            reason = reason if known < _MAX_REASONS else _OTHER
            self.reasons[record.file] = known + 1
        entry = self.skipped.setdefault((record.file, reason), SkippedInput(record.file, reason, count=0))
        entry.count += 1
        if record.place and len(entry.places) < _MAX_PLACES:
            entry.places.append(record.place)

    def add_inputs(self, entries: list[SkippedInput]) -> None:
        """Add the inputs that are not readable files."""
        self.skipped |= {(entry.path, entry.reason): entry for entry in entries}

    def to_json(self) -> list[dict[str, Any]]:
        """Return the skipped inputs, sorted by path."""
        return [entry.to_json() for _, entry in sorted(self.skipped.items())]

    def why_empty(self) -> str:
        """Return one line that explains why no document was accepted."""
        filtered = sum(self.filtered.values())
        first = next(iter(self.skipped.values()), None)
        example = f"; {first.path}: {first.reason}" if first else ""
        return (
            f"{len(self.skipped)} files or groups of documents skipped, {filtered} documents outside the length "
            f"limits{example}"
        )
