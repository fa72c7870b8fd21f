"""Values that reach a shell, ssh, pdsh, Open MPI or sbatch arrive unchanged, or are refused before anything starts.

A recorder takes the place of Python, so each test sees what the ranks would get: arguments, variables, current folder.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import write_manifest
from fuzz import attempt
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fusiontree import cli
from fusiontree.config import KEYS, load_config
from fusiontree.errors import UserError
from launcher import hostfile, job, local, multihost, quoting, sbatch
from launcher.job import Plan
from launcher.sbatch import JobOptions

MARKER = "executed"  # the file that hostile values would create in the current folder
HOSTILE = (
    *(f"$(touch {MARKER})", f"`touch {MARKER}`", f"'; touch {MARKER}; '", f'"; touch {MARKER}; "'),
    f"; touch {MARKER} #",
    *("%n", "%h", "%j", "%%", "\\", "\\\\", "'", '"', "$HOME", "${x}", "~", "*", "exp[12]", "{a,b}", "!", "&", "|"),
    *(" ", "@run", "@", "#", "END", "-x", "--", "=", ">f", "é", "\u202e"),
)
# text without NUL and surrogates, which no variable and no path contains, rich in what shells interpret
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
TEXT = st.lists(st.sampled_from(HOSTILE) | st.text(CHARACTERS, max_size=4), max_size=5).map("".join)
NAMES = TEXT.map(lambda text: text.replace("/", "_").encode()[:100].decode(errors="ignore")).filter(
    lambda text: text not in ("", ".", "..")
)
PRINTABLE = NAMES.filter(lambda text: not any(map(quoting.has_control_characters, text)))
EXAMPLES = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

RECORDER = """#!/bin/bash
if [ "$2" = launcher.allocation ]; then
    [ "$3" = end ] || printf 'nodes=1\\nlogs=%q\\nexport MASTER_ADDR=node1 MASTER_PORT=21000 WORLD_INFO=x\\n' "$4"
    exit
fi
{ printf '%s\\0' "$PWD" "$#" "$@"; env -0; } > RECORD
"""
# srun runs its program once
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
"""


class Seen(NamedTuple):
    """The start of a process that the recorder replaced."""

    folder: str
    arguments: list[str]
    environment: dict[str, str]


class Place:
    """A fresh folder per example: the current folder, the run's folder, a recorder and a fake srun."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.monkeypatch, self.numbers = root, monkeypatch, itertools.count()

    def enter(self, here: str, output: str, python: str) -> Path:
        """Enter the folder `here` with `python` as its Python, and return the run's folder below `output`."""
        base = self.root / str(next(self.numbers))
        self.record = base / "record"
        for path in (base / "here" / here, base / "runs" / output / "run", base / "bin" / python):
            path.mkdir(parents=True)
        recorder = base / "bin" / python / "python"
        recorder.write_text(RECORDER.replace("RECORD", str(self.record)))
        recorder.chmod(0o755)
        (base / "bin/srun").write_text(SRUN)
        (base / "bin/srun").chmod(0o755)
        self.base, self.path = base, f"{base / 'bin'}:/usr/bin:/bin"
        self.monkeypatch.chdir(base / "here" / here)
        self.monkeypatch.setattr(sys, "executable", str(recorder))
        return base / "runs" / output / "run"

    def run(self, *command: str, **environment: str) -> Seen:
        """Run a command that starts the recorder, and return what that got."""
        done = subprocess.run(
            command, env={"PATH": self.path, "HOME": "/", **environment}, capture_output=True, text=True, check=False
        )
        assert self.record.exists(), f"{command}\n{done.stderr}"
        folder, count, *words = self.record.read_text().split("\0")
        entries = (word.split("=", 1) for word in words[int(count) : -1])
        assert not list(self.base.rglob(MARKER)), "a value was executed"
        return Seen(folder, words[: int(count)], dict(entries))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    for name in list(os.environ):
        if name.startswith(job.FORWARDED) or name in ("LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return Place(tmp_path, monkeypatch)


def planned(run: Path, argument: str, value: str, setup: tuple[str, ...] = ()) -> Plan:
    program = ("fusiontree", "train", str(run / "config.yaml"), argument)
    hosts = {"node1": (0,), "node2": (0,)}
    return Plan(2, 1, program, {"VALUE": value}, "node1", 21000, hosts=hosts, setup=setup)


def through_pdsh(command: str) -> str:
    """Return the text that pdsh passes to ssh for its second host."""
    expansions = {"n": "1", "h": "node2", "u": "root", "%": "%"}
    return re.sub(r"%([nhu%])", lambda match: expansions[match[1]], command)


@pytest.mark.slow
@EXAMPLES
@given(here=PRINTABLE, output=PRINTABLE, argument=PRINTABLE, value=TEXT)
@example(here=f"a $(touch {MARKER})", output=f"b 'c' $(touch {MARKER})", argument="x", value=f"$(touch {MARKER})\n`id`")
@example(here="%h", output="%n %u", argument="%n", value=" both ends ")
def test_values_arrive_at_the_hosts_of_a_hostfile(place, here, output, argument, value):
    run = place.enter(here, output, "venv " + output)
    plan = planned(run, argument, value, ("export MADE='by setup'",))
    for launcher in ("pdsh", "openmpi"):
        for name, content in multihost.launch_files(plan, launcher, run).items():
            (run / name).write_text(content)
        command = multihost.render(plan, launcher, run)
        if launcher == "pdsh":
            assert command[-2] == "node1,node2"
            seen = place.run("sh", "-c", through_pdsh(command[-1]))
            assert seen.arguments[:3] == ["-u", "-m", "deepspeed.launcher.launch"]
            assert "--node_rank=1" in seen.arguments
            program = seen.arguments[seen.arguments.index("--module") + 1 :]
        else:
            ranks = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
            seen = place.run(*command[-2:], **ranks)
            assert (seen.environment["RANK"], seen.environment["WORLD_SIZE"]) == ("1", "2")
            assert seen.arguments[0] == "-m"
            program = seen.arguments[1:]
        assert program == list(plan.program)
        assert seen.folder == os.getcwd()
        expected = {"VALUE": value, "FUSIONTREE_LAUNCH": str(run), "MADE": "by setup", "MASTER_ADDR": "node1"}
        assert {name: seen.environment.get(name) for name in expected} == expected


@pytest.mark.slow
@EXAMPLES
@given(here=PRINTABLE, output=PRINTABLE, value=TEXT)
@example(here="a 'b'", output='c "d"', value="END\nEND_")
def test_the_dry_run_of_a_hostfile_writes_the_same_files(place, here, output, value):
    run = place.enter(here, output, "venv")
    plan = planned(run, "x", value)
    place.monkeypatch.setattr(multihost, "_launch_folder", lambda run: run / "launch")
    files, _ = multihost.command_line(plan, "openmpi", run).rsplit("\n", 1)
    subprocess.run(["bash", "-e", "-c", files], check=True)
    for name, content in multihost.launch_files(plan, "openmpi", run / "launch").items():
        assert (run / "launch" / name).read_bytes().decode() == content
    assert not list(place.base.rglob(MARKER))


def sbatch_words(line: str) -> str:
    """Return an option as sbatch reads it from its ``#SBATCH`` line (``_get_argument`` in SLURM's opt.c)."""
    found, quote, escaped = "", "", False
    for character in line.removeprefix("#SBATCH "):
        if escaped:
            found, escaped = found + character, False
        elif character == "\\":
            escaped = True
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif not quote and (character.isspace() or character == "#"):
            break
        else:
            found += character
    return found


@pytest.mark.slow
@EXAMPLES
@given(here=PRINTABLE, output=PRINTABLE, value=TEXT, account=PRINTABLE, tasks=st.sampled_from(["rank", "node"]))
@example(
    here=f"a $(touch {MARKER})", output=f"$(touch {MARKER}) 'b' \"c\" #", value="a\nb", account="l ab", tasks="rank"
)
@example(here="a @run", output="b @run", value="@run $run", account='"', tasks="node")
def test_values_arrive_at_the_ranks_of_slurm(place, here, output, value, account, tasks):
    run = place.enter(here, output, "venv " + here)
    plan, options = planned(run, "--json", value), JobOptions(account=account, tasks=tasks)
    if set("%\\") & set(str(run)):
        with pytest.raises(UserError, match="SLURM cannot write logs to"):
            sbatch.render(plan, options, [run], run / "logs")
        return
    script = sbatch.render(plan, options, [run], run / "logs")
    header = list(itertools.takewhile(lambda line: line.startswith("#"), script.split("\n")))
    found = [sbatch_words(line) for line in header[1:]]
    assert f"--account={account}" in found
    assert f"--output={run}/logs/slurm-%j.log" in found
    assert script.count("#SBATCH --") == script.count("\n#SBATCH --") == len(header) - 1
    (run / "job").write_bytes(script.encode())
    seen = place.run("bash", str(run / "job"))
    assert seen.arguments[seen.arguments.index("fusiontree") :] == list(plan.program)
    assert (seen.folder, seen.environment["VALUE"]) == (os.getcwd(), value)


@pytest.mark.slow
@EXAMPLES
@given(here=PRINTABLE, output=PRINTABLE, argument=PRINTABLE)
@example(here="a b", output=f"$(touch {MARKER})", argument=f"'$(touch {MARKER})'")
def test_values_arrive_at_local_ranks(place, here, output, argument):
    run = place.enter(here, output, "venv")
    plan = Plan(1, 2, ("fusiontree", "train", str(run), argument), {}, "127.0.0.1", 21000, setup=("export MADE=x",))
    seen = place.run(*local.render(plan))
    assert seen.arguments[seen.arguments.index("--module") + 1 :] == list(plan.program)
    assert (seen.folder, seen.environment["MADE"]) == (os.getcwd(), "x")


# --- the door --------------------------------------------------------------------------------------------------------

# a value of each key that is a string in a valid configuration
STRINGS = ("name", "output", "init_from", "deepspeed", "nvme_path", "distill.teacher", "data.path", "data.cache")
STRINGS += ("data.sources.web.path", *(key for key in KEYS if key.startswith("kernels.")))


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\ud800"])
@pytest.mark.parametrize("key", STRINGS)
def test_no_value_of_the_configuration_has_a_control_character(key, control):
    text = f"runs{control}#SBATCH --exclusive"
    quoted = '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'
    with pytest.raises(UserError) as caught:
        load_config("tiny", [f"{key}={quoted}"])
    assert str(caught.value).startswith(f"{key} is ")
    assert "contains a control character" in str(caught.value)
    assert str(caught.value).isprintable()


@EXAMPLES
@given(names=st.lists(NAMES | st.from_regex(r"[\w.@:/,^-]{1,12}", fullmatch=True), min_size=1, max_size=4))
@example(names=["-oProxyCommand=touch"])
@example(names=["exec:node1"])
@example(names=["node[1-2]"])
@example(names=["^hosts"])
@example(names=["node1,node2"])
def test_a_host_name_is_plain_or_refused(names, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{name} slots=1\n" for name in names), newline="\n")
    hosts = attempt(lambda: hostfile.read(path))
    assert isinstance(hosts, UserError) or all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", host) for host in hosts)


@EXAMPLES
@given(name=TEXT, value=TEXT)
@example(name=f"A;touch {MARKER}", value="1")
@example(name="A B", value="1")
@example(name="é", value="1")
def test_a_variable_has_a_plain_name_and_any_value(name, value):
    def plan() -> Plan:
        options = job.launch_options([f"{name}={value}"], None, [])
        return Plan(1, 1, ("fusiontree",), options.environment, "127.0.0.1", 1)

    made = attempt(plan)
    if not isinstance(made, UserError):
        assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) for key in made.environment)
        assert list(made.environment.values()) in ([f"{name}={value}".partition("=")[2]], [])


@pytest.mark.parametrize("target", ["--local 1", "--hostfile hosts", "--slurm --ranks-per-node 1"])
@pytest.mark.parametrize(
    ("variable", "source"), [("NCCL_A;touch executed", "launch"), ("A;touch executed", ".deepspeed_env")]
)
def test_a_variable_of_the_launch_has_a_plain_name(target, variable, source, tmp_path, monkeypatch, capsys):
    write_manifest(tmp_path, 8192)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    Path("hosts").write_text("node1 slots=1\n")
    if source == "launch":
        monkeypatch.setenv(variable, "1")
    else:
        Path(".deepspeed_env").write_text(f"{variable}=1\n")
    reads_it = {"launch": "--local" not in target, ".deepspeed_env": "--hostfile" in target}[source]
    words = ["launch", "tiny", *target.split(), "--dry-run", "data.path=."]
    assert cli.main(words) == (2 if reads_it else 0)
    error = capsys.readouterr().err
    assert not reads_it or error.startswith(f"fusiontree: error: environment variable '{variable}' cannot be passed")


@pytest.mark.parametrize(("option", "name"), [("--env-file", "environment"), ("--hostfile", "hosts")])
def test_a_binary_file_is_refused(option, name, tmp_path, monkeypatch, capsys):
    write_manifest(tmp_path, 8192)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00A=\x80")
    target = ["--local", "1"] if option == "--env-file" else []
    assert cli.main(["launch", "tiny", *target, option, str(tmp_path / name), f"data.path={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"fusiontree: error: {tmp_path / name} is not UTF-8 text; name another file, or save it as UTF-8\n"
    )


def test_only_values_of_an_environment_file_lose_their_quotes(tmp_path):
    path = tmp_path / "env"
    path.write_text("A='two words'\nB='it's'\nC='a' 'b'\n D = x \n")
    expected = {"A": "two words", "B": "'it's'", "C": "'a' 'b'", "D": "x", "E": "'quoted' "}
    assert job.launch_options(["E='quoted' "], path, []).environment == expected


@pytest.mark.parametrize("folder", ["a:b", "a,b"])
@pytest.mark.parametrize("image", ["image.sif", "nvcr.io#image"])
def test_a_folder_that_no_list_of_mounts_can_express_is_refused(folder, image, place):
    run = place.enter("here", folder, "venv")
    with pytest.raises(UserError, match="cannot be mounted in a container"):
        sbatch.render(planned(run, "x", ""), JobOptions(container=image), [run], run / "logs")


@pytest.mark.parametrize("option", ["exclusive\ntouch executed", "--comment=\x1b"])
def test_an_option_of_sbatch_is_one_line(option, place):
    run = place.enter("here", "out", "venv")
    with pytest.raises(UserError, match="contains a control character"):
        sbatch.render(planned(run, "x", ""), JobOptions(extra=(option,)), [run], run / "logs")


def test_a_current_folder_with_a_newline_is_refused(place):
    run = place.enter("a\nb", "out", "venv")
    with pytest.raises(UserError, match=r"the current folder '.*a\\nb' contains a control character"):
        planned(run, "x", "")
