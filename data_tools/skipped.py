"""What became of the inputs: counts, and the names of what was left out."""

from dataclasses import dataclass, field
from typing import Any

from data_tools.inputs import Skipped
from data_tools.readers import TOO_LONG, TOO_SHORT, Record

_PLACES = 10  # named of a file's documents that were left out for the same reason
_REASONS = 20  # told apart in a file; a file of random lines could have one each
_OTHER = "other reasons"


@dataclass
class Report:
    """Counts of records, by what became of them."""

    documents: int = 0  # taken
    filtered: dict[str, int] = field(default_factory=lambda: {TOO_SHORT: 0, TOO_LONG: 0})
    left_out: dict[tuple[str, str], Skipped] = field(default_factory=dict)  # by file and reason
    reasons: dict[str, int] = field(default_factory=dict)  # by file, how many are told apart

    def reject(self, record: Record, reason: str) -> None:
        """Count a record that is no document."""
        if reason in self.filtered:
            self.filtered[reason] += 1
            return
        if (record.file, reason) not in self.left_out:
            known = self.reasons.get(record.file, 0)
            reason = reason if known < _REASONS else _OTHER
            self.reasons[record.file] = known + 1
        entry = self.left_out.setdefault((record.file, reason), Skipped(record.file, reason, count=0))
        entry.count += 1
        if record.place and len(entry.places) < _PLACES:
            entry.places.append(record.place)

    def skip(self, entries: list[Skipped]) -> None:
        """Take in what was no file."""
        self.left_out |= {(entry.path, entry.reason): entry for entry in entries}

    def skipped(self) -> list[dict[str, Any]]:
        """What was left out, sorted by path."""
        return [entry.to_json() for _, entry in sorted(self.left_out.items())]

    def why_nothing(self) -> str:
        """One line for a user whose inputs hold no document at all."""
        filtered = sum(self.filtered.values())
        first = next(iter(self.left_out.values()), None)
        named = f"; {first.path}: {first.reason}" if first else ""
        return f"{len(self.left_out)} files or groups of documents skipped, {filtered} of another length{named}"
