"""Ranks of real training runs and other programs, forked from a process that has imported torch and DeepSpeed.

Each rank runs the complete command ``fusiontree train``, up to its exit code.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from fusiontree.distributed.ports import free_port

slow = True  # whether the current test is marked slow
_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTS = [
    *("torch", "deepspeed", "fusiontree.cli", "fusiontree.training.trainer", "fusiontree.export.exporter"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with torch's compiler: DeepSpeed imports it when an engine starts
]


def _rank(argv: list[str], environment: dict[str, str], output: Path, setup: Callable[[], None] | None) -> None:
    with open(output, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    import torch

    from fusiontree.cli import main

    torch.set_num_threads(1)
    if setup is not None:
        setup()
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as __main__ does


def _start_server() -> None:
    """Start the process that all others are forked from, unless it is running."""
    assert slow, "mark this test slow or use in_process: the first fork needs 6 CPU seconds of imports"
    _CONTEXT.set_forkserver_preload(_IMPORTS)
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def _python(words: list[str], environment: dict[str, str], folder: Path, cwd: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as stream:
            os.dup2(stream.fileno(), number)
    import torch

    torch.set_num_threads(1)
    option, program, *arguments = words
    sys.argv = [option, *arguments]
    if option == "-c":
        exec(program, {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def python(words: list[str], folder: Path, cwd: Path, timeout: float) -> tuple[int, str, str]:
    """Run ``python WORDS`` in a fork of the server, which saves the 2 to 6 CPU seconds of its imports.

    Args:
        words: -c SOURCE or -m MODULE, and arguments.
        folder: an empty folder for its output.
        cwd: its working directory.
        timeout: in seconds; a later command is killed.

    Returns:
        Exit code, standard output and standard error.
    """
    try:
        code = call(_python, words, dict(os.environ), folder, cwd, timeout=timeout)
    except TimeoutError as error:
        error.add_note((folder / "stderr").read_text())
        raise
    return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def call(function: Callable[..., None], *arguments: object, timeout: float = 240) -> int:
    """Call a module-level function in a fork of the server; return the exit code, -N after signal N."""
    _start_server()
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{function.__name__}{arguments}: no end after {timeout} s")
    assert process.exitcode is not None
    return process.exitcode


@dataclass
class Job:
    """The ranks of one run."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def codes(self, seconds: float = 300) -> list[int | None]:
        """Wait for all ranks and return their exit codes, -N after signal N."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} ranks did not end:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """Return standard output and error of all ranks."""
        return "".join(path.read_text() for path in self.outputs if path.exists())


def start(argv: list[str], folder: Path, ranks: int = 1, setup: Callable[[], None] | None = None) -> Job:
    """Start `ranks` ranks of a command.

    Args:
        argv: the command's words, e.g. train, tiny, seed=3.
        folder: for the ranks' output.
        ranks: their number.
        setup: called by each rank before the command; a module-level function, because it is pickled.
    """
    _start_server()
    port = str(free_port())
    processes, outputs = [], []
    for rank in range(ranks):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outputs.append(folder / f"rank-{rank}.out")
        arguments = ([*map(str, argv)], environment, outputs[-1], setup)
        processes.append(_CONTEXT.Process(target=_rank, args=arguments, daemon=True))
        processes[-1].start()
    return Job(processes, outputs)


def run(argv: list[str], folder: Path, ranks: int = 1, setup: Callable[[], None] | None = None, code: int = 0) -> str:
    """Run `ranks` ranks of a command, check that all exit with `code`, and return their output."""
    job = start(argv, folder, ranks, setup)
    codes = job.codes()
    assert codes == [code] * ranks, f"{codes}\n{job.output()}"
    assert "Traceback" not in job.output(), job.output()
    return job.output()
