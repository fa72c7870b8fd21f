"""What ranks leave in the folder of a launch, which all hosts share, and who of them failed first.

``rank-N.started`` (host, process id) when it has begun, ``rank-N.json`` when it has ended by itself (`launcher.local`),
and under SLURM ``rank-N.out``, its output.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.errors import LOST_PEER

_TAIL = 15  # lines of a rank's output that are shown where it has said nothing itself


class Failure(NamedTuple):
    """The first rank that failed, and what is known of why."""

    code: int | None  # its exit code; None: it was killed, or could not even begin
    message: str


def read(folder: Path) -> list[dict[str, Any]]:
    """What the ranks have said of their ends: rank, host, code, message (None: it wrote a traceback), time."""
    return [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]


def joined(folder: Path) -> dict[int, str]:
    """Host of every rank that has begun."""
    return {_rank(path): path.read_text().split()[0] for path in folder.glob("rank-*.started")}


def processes(folder: Path) -> list[int]:
    """Process ids of the ranks that have begun, each on its host."""
    return [int(path.read_text().split()[1]) for path in folder.glob("rank-*.started")]


def silent(folder: Path) -> list[int]:
    """Ranks that have begun and not said how they ended."""
    begun = {_rank(path) for pattern in ("rank-*.started", "rank-*.out") for path in folder.glob(pattern)}
    return sorted(begun - {report["rank"] for report in read(folder)})


def failures(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the reports that tell of a failure, the first in time first; one that only lost another rank, which is
    no cause, behind all others.
    """
    failed = [report for report in said if report["code"]]
    return sorted(failed, key=lambda report: (report["message"] == LOST_PEER, report["time"]))


def names_a_cause(failed: list[dict[str, Any]]) -> bool:
    """Whether the first of `failures` is more than the consequence of another rank's end."""
    return bool(failed) and failed[0]["message"] != LOST_PEER


def first_failure(folder: Path) -> Failure | None:
    """The failure that the others come from; None if no rank failed, or none that left a trace.

    A rank that only lost another is no cause; one that ended without a word may be.
    """
    failed = failures(read(folder))
    if names_a_cause(failed):
        first = failed[0]
        words = first["message"] or f"failed{_output(folder, first['rank'])}"
        return Failure(first["code"], f"rank {first['rank']} on {first['host']}: {words}")
    for rank in silent(folder):
        where = f" on {host}" if (host := joined(folder).get(rank)) else ""
        return Failure(None, f"rank {rank}{where} ended without a word{_output(folder, rank)}")
    return Failure(failed[0]["code"], failed[0]["message"]) if failed else None


def _output(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.out"
    lines = path.read_text(errors="replace").splitlines()[-_TAIL:] if path.exists() else []
    return ", its output ends:\n" + "\n".join(f"  {line}" for line in lines) if lines else "; see its host's log"


def _rank(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))
