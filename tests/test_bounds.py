"""Extreme numbers in a configuration or in a launcher's variables are refused in one line, and never hang a command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_manifest
from fuzz import attempt

from fusiontree import cli
from fusiontree.config import KEYS, load_config
from fusiontree.distributed import environment, outcome
from fusiontree.doctor import memory
from fusiontree.errors import UserError
from launcher import probing
from launcher.job import plan_local

EXTREMES = ("-1", "0", "200000", str(2**63 - 1), str(10**18), str(10**30), "1e300", "5e-324", "9" * 5000)


@pytest.mark.parametrize("value", EXTREMES)
def test_every_key_has_bounds(value: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, 8192)

    def start(key: str) -> None:
        config = load_config("tiny", [f"data.path={tmp_path}", f"{key}={value}"])
        memory.table(config, 2)
        memory.disk_bytes(config)
        plan_local(config, "tiny", [], 2)

    for key in KEYS:
        began = time.thread_time()
        attempt(lambda key=key: start(key))
        assert time.thread_time() - began < 5, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"batch.tokens={10**18}", "batch.tokens is 1000000000000000000; it must be less than or equal to 68719476736"),
        ("model.num_layers=200000", "num_layers is 200000; it must be at most 4096"),
        (f"seed={10**30}", f"seed is {10**30}; it must be below 2^63"),
        ("seed=" + "9" * 5000, "999...': not valid YAML: "),
        ("seed=" + "[" * 5000, "not valid YAML: it is nested too deeply"),
        (
            "health.timeout_seconds=1e300",
            "health.timeout_seconds is 1e+300; it must be less than or equal to 100000000",
        ),
    ],
)
def test_a_value_beyond_its_bound_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("tiny", [override])
    assert message in str(caught.value)


def test_a_batch_names_the_nearest_rank_counts_without_trying_all(tmp_path: Path) -> None:
    config = load_config("tiny", [f"data.path={tmp_path}", f"batch.tokens={2**36}"])
    began = time.thread_time()
    with pytest.raises(UserError, match="nearest rank counts for this batch: 2 or 4"):
        config.accumulation_steps(3)
    assert time.thread_time() - began < 5


# --- variables of a launcher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "../x", "²", "9" * 30, str(2**31)])
@pytest.mark.parametrize("launched", [False, True])
def test_a_rank_that_is_no_number_is_refused(launched: bool, value: str, tmp_path: Path, monkeypatch, capsys) -> None:
    if launched:
        monkeypatch.setenv(outcome.LAUNCH_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", value)
    with pytest.raises(UserError, match=r"^variable RANK is .*; it must be a number below 2147483648; unset it"):
        environment.number("RANK", 0)
    assert outcome.report(1, "words") in (False, value.isdecimal() and launched)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc"}, "variable RANK is 'abc'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "variable RANK is '2'; it must be a number below 2"),
        ({"MASTER_PORT": "99999"}, "variable MASTER_PORT is '99999'; it must be a number below 65536"),
    ],
)
@pytest.mark.slow
def test_a_process_with_invalid_variables_ends_with_one_line(variables, message, tmp_path: Path) -> None:
    code = "from fusiontree.distributed import collectives; collectives.start()"
    command = [sys.executable, "-c", code.replace("; ", "\n")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert f"UserError: {message}" in done.stderr


@pytest.mark.slow
def test_doctor_probes_all_hosts_of_a_hostfile_without_nodes(tmp_path: Path, monkeypatch, capsys) -> None:
    write_manifest(tmp_path, 8192)
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    seen = []
    monkeypatch.setattr(probing, "probe_cluster", lambda config, nodes, ranks, hosts: seen.append((nodes, hosts)))
    words = ["doctor", "tiny", "--hostfile", str(tmp_path / "hosts"), f"data.path={tmp_path}", f"output={tmp_path}"]
    cli.main(words)
    assert seen == [(2, tmp_path / "hosts")]
    assert cli.main([*words[:3], "nowhere", *words[4:]]) == 2
    assert capsys.readouterr().err.endswith("does not exist; give a file with one line `NAME slots=N` per host\n")
