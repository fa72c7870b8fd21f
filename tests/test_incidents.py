"""A run's record of incidents: whole lines, whoever writes them and whatever cuts them short."""

import multiprocessing
from pathlib import Path

from fusiontree import incidents


def _write(folder: Path, rank: int) -> None:
    for step in range(200):
        incidents.record(folder, "skipped_update", step, "x" * 500, rank=rank)


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    ranks = [multiprocessing.Process(target=_write, args=(tmp_path, rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = incidents.read(tmp_path)
    assert len(found) == 600
    assert all([line["step"] for line in found if line["rank"] == rank] == list(range(200)) for rank in range(3))


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    assert incidents.read(tmp_path) == []
    incidents.record(tmp_path, "resume", 4, "resumed")
    with open(tmp_path / incidents.FILE, "a") as stream:
        stream.write('{"time": 1.0, "kind": "ha')
    assert [(line["kind"], line["step"], line["message"]) for line in incidents.read(tmp_path)] == [
        ("resume", 4, "resumed")
    ]
