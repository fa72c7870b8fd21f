"""A run's incidents: complete lines despite concurrent writers, crashes and full disks."""

import multiprocessing
import resource
from pathlib import Path

import pytest

from fusiontree.run import incidents
from fusiontree.run.folder import INCIDENTS_FILE
from fusiontree.run.jsonlines import JsonLines, read_lines
from fusiontree.run.state_files import Stored, parse_stored


def _write(folder: Path, rank: int) -> None:
    for step in range(200):
        incidents.record(folder, "skipped_update", step, "x" * 500, rank=rank)


def _parse(line: bytes) -> dict:
    return parse_stored(line, Stored).model_dump()


def test_lines_of_several_processes_are_never_mixed(tmp_path: Path) -> None:
    ranks = [multiprocessing.Process(target=_write, args=(tmp_path, rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = incidents.read(tmp_path)
    assert len(found) == 600
    assert all([line["step"] for line in found if line["rank"] == rank] == list(range(200)) for rank in range(3))


def test_a_truncated_line_is_skipped(tmp_path: Path) -> None:
    assert incidents.read(tmp_path) == []
    incidents.record(tmp_path, "resume", 4, "resumed")
    with open(tmp_path / INCIDENTS_FILE, "a") as stream:
        stream.write('{"time": 1.0, "kind": "ha')
    assert [(line["kind"], line["step"], line["message"]) for line in incidents.read(tmp_path)] == [
        ("resume", 4, "resumed")
    ]
    incidents.record(tmp_path, "fallback", 2, "and costs no other")
    assert [line["step"] for line in incidents.read(tmp_path)] == [4, 2]


def test_lines_rejected_by_a_full_disk_are_reported_once_and_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sent = [{"step": step, "text": "x" * 5000} for step in range(5)]
    size = 5024
    for room in (0, 1, size // 2, size - 2, size - 1, size):
        lines = JsonLines(tmp_path / str(room))
        lines.add(sent[0])
        assert lines.path.stat().st_size == size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
        try:
            for line in sent[1:3]:
                lines.add(line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for line in sent[3:]:
            lines.add(line)
        lines.close()
        assert [line for _, line in read_lines(lines.path, _parse)] == sent
        assert capsys.readouterr().err.count("; lines are queued until they can be written\n") == 1


def test_lines_that_can_never_be_written_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = JsonLines(tmp_path / "away" / "f")
    for step in range(3):
        lines.add({"step": step})
    lines.close()
    assert capsys.readouterr().err.endswith("/away/f: No such file or directory; its last 3 lines are lost\n")
