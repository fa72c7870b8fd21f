"""Files that ranks write into the launch folder, and the failure that caused the others.

The launch folder is on a disk that all hosts of the job share::

    rank-N.started  host and process id, written when the rank starts
    rank-N.json     exit report of a rank that ended on its own (`fusiontree.distributed.outcome`)
    rank-N.out      output of the rank's SLURM task
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.errors import LOST_PEER
from fusiontree.run.state_files import Count, DamagedError, Stored, read_line, read_stored

_TAIL = 15  # lines of a rank's output to show if its report has no message


class _Report(Stored):
    rank: Count
    host: str
    code: int
    message: str | None
    time: int


class Failure(NamedTuple):
    """The first rank that failed, and the known reason."""

    code: int | None  # exit code; None: the rank was killed, or never started
    message: str


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the exit reports: rank, host, code, message (None: the rank printed a traceback), time (ns).

    A rank whose report is damaged counts as a rank without one.
    """
    reports = []
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(DamagedError, FileNotFoundError):
            reports.append(read_stored(path, _Report).model_dump())
    return reports


def started_hosts(folder: Path) -> dict[int, str]:
    """Return the host of every rank that has started."""
    return {rank: host for rank, (host, _) in _started(folder).items()}


def process_ids(folder: Path) -> list[int]:
    """Return the process ids of the ranks that have started, each valid on its own host."""
    return [process_id for _, process_id in _started(folder).values()]


def _started(folder: Path) -> dict[int, tuple[str, int]]:
    """Return host and process id of every rank that has started; damaged start reports are left out."""
    found = {}
    for rank, path in _by_rank(folder, "started"):
        with contextlib.suppress(DamagedError, FileNotFoundError, ValueError):
            host, process_id = read_line(path).split()
            found[rank] = host, int(process_id)
    return found


def unreported(folder: Path) -> list[int]:
    """Return the ranks that have started and have not written an exit report."""
    started = {rank for kind in ("started", "out") for rank, _ in _by_rank(folder, kind)}
    return sorted(started - {report["rank"] for report in read(folder)})


def failures(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports with a non-zero code by time, consequences of a lost peer last."""
    failed = [report for report in reports if report["code"]]
    return sorted(failed, key=lambda report: (report["message"] == LOST_PEER, report["time"]))


def includes_cause(failed: list[dict[str, Any]]) -> bool:
    """Return whether the first of `failures` is more than the consequence of a lost peer."""
    return bool(failed) and failed[0]["message"] != LOST_PEER


def first_failure(folder: Path) -> Failure | None:
    """Return the failure that caused the others, or None if no rank failed or left a trace.

    A reported cause comes first, then a rank without an exit report, then the report of a lost peer.
    """
    failed = failures(read(folder))
    if includes_cause(failed):
        first = failed[0]
        reason = first["message"] or f"failed; {_last_output(folder, first['rank'])}"
        return Failure(first["code"], f"rank {first['rank']} on {first['host']}: {reason}")
    for rank in unreported(folder):
        where = f" on {host}" if (host := started_hosts(folder).get(rank)) else ""
        return Failure(None, f"rank {rank}{where} ended without an exit report; {_last_output(folder, rank)}")
    return Failure(failed[0]["code"], failed[0]["message"]) if failed else None


def _last_output(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.out"
    lines = path.read_text(errors="replace").splitlines()[-_TAIL:] if path.exists() else []
    if not lines:
        return "see the system log of its host"
    return "the last lines of its output:\n" + "\n".join(f"  {line}" for line in lines)


def _by_rank(folder: Path, kind: str) -> Iterator[tuple[int, Path]]:
    """Yield rank and path of the files of a kind, such as ``started``."""
    for path in folder.glob(f"rank-*.{kind}"):
        if (rank := path.stem.removeprefix("rank-")).isdecimal():
            yield int(rank), path
