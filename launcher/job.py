"""The plan of a job: its ranks, program, environment and rendezvous, complete before any process starts."""

import base64
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusiontree.config import RunConfig, check_deepspeed_file, load_config, to_yaml
from fusiontree.console import console
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.distributed.ports import free_port
from fusiontree.errors import UserError
from fusiontree.files import read_text, write_atomic
from fusiontree.run.changes import check_changes
from fusiontree.run.datasets import check_data
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, LOGS, refuse_foreign
from launcher import quoting

# rendezvous ports: below the ephemeral ports that Linux gives to clients (32,768 and up)
_FIRST_PORT, _PORTS = 20_000, 10_000

# prefixes of the variables that every rank gets from the environment of the launch
_NETWORK = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_")
FORWARDED = (
    *_NETWORK,
    "TORCH_",
    "CUDA_",
    "FUSIONTREE_",
    "WANDB_",
    "HF_",
    "OMP_",
    "DS_",
    "TRITON_",
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")  # must not appear in a script or a process list


@dataclass(frozen=True)
class LaunchOptions:
    """A user's additions to the environment of the ranks."""

    environment: Mapping[str, str] = field(default_factory=dict)  # overrides all other variables
    setup: tuple[str, ...] = ()  # shell lines that run first on every node, e.g. for modules or conda


@dataclass(frozen=True)
class Plan:
    """A checked job; each launch target renders it as its own command or script.

    Raises:
        UserError: a variable's name or a path cannot be passed to the ranks.
    """

    nodes: int
    ranks_per_node: int
    program: tuple[str, ...]  # Python module that every rank runs, then its arguments
    environment: Mapping[str, str]  # overrides the environment of the launch
    master_address: str  # host of rank 0; empty: the first node of the allocation
    master_port: int  # 0: chosen when the job starts
    devices: tuple[int, ...] | None = None  # index of each rank's GPU; None: the first GPUs, or CPUs
    hosts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # slots to use on each host of a hostfile
    setup: tuple[str, ...] = ()  # shell lines that run first on every node

    def __post_init__(self) -> None:
        quoting.check_variable_names(self.environment)
        quoting.check_one_line("the current folder", os.getcwd())
        quoting.check_one_line("the path of Python", sys.executable)
        for word in self.program:
            quoting.check_one_line("the argument", word)

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return sum(map(len, self.hosts.values())) or self.nodes * self.ranks_per_node


def plan_local(
    config: RunConfig, source: str, overrides: Sequence[str], ranks: int, options: LaunchOptions = LaunchOptions()
) -> Plan:
    """Check a training job of `ranks` ranks on this machine and plan it.

    Args:
        config: the configuration that the ranks will read from `source` and `overrides`.

    Raises:
        UserError: the batch is not divisible by the ranks, the dataset or the DeepSpeed settings are missing or
            invalid, or there are fewer GPUs than ranks.
    """
    if ranks < 1:
        raise UserError(f"--local is {ranks}; it must be at least 1")
    _check(config, ranks)
    gpus = visible_gpus()
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if gpus else "cpu")
    return Plan(
        nodes=1,
        ranks_per_node=ranks,
        program=("fusiontree", "train", source, *overrides),
        environment={
            "DS_ACCELERATOR": accelerator,
            "OMP_NUM_THREADS": _omp_threads(len(os.sched_getaffinity(0)) // ranks),
            **options.environment,
        },
        master_address="127.0.0.1",
        master_port=free_port(),
        devices=_devices(gpus, ranks) if accelerator == "cuda" else None,
        setup=options.setup,
    )


def plan_hosts(
    config: RunConfig, hosts: Mapping[str, tuple[int, ...]], arguments: Sequence[str], options: LaunchOptions
) -> Plan:
    """Check a training job with one rank on every slot of `hosts` and plan it; rank 0 is on the first host.

    Args:
        arguments: further arguments of `fusiontree train`.

    Raises:
        UserError: the batch is not divisible by the ranks, or the dataset or the DeepSpeed settings are missing or
            invalid.
    """
    _check(config, sum(map(len, hosts.values())))
    return plan_program(_program(config, arguments), hosts, options)


def plan_program(program: tuple[str, ...], hosts: Mapping[str, tuple[int, ...]], options: LaunchOptions) -> Plan:
    """Plan `program` (a Python module and its arguments) on every slot of `hosts`."""
    return Plan(
        nodes=len(hosts),
        ranks_per_node=max(map(len, hosts.values())),
        program=program,
        environment={
            **forwarded(os.environ),
            "OMP_NUM_THREADS": _omp_threads(1),
            **_deepspeed_environment(),
            **options.environment,
        },
        master_address=next(iter(hosts)),
        master_port=rendezvous_port(os.getpid()),
        hosts=hosts,
        setup=options.setup,
    )


def plan_slurm(
    config: RunConfig,
    nodes: int,
    ranks_per_node: int,
    gpus: bool,
    arguments: Sequence[str],
    options: LaunchOptions,
    cores: int = 1,
) -> Plan:
    """Check a training job with `ranks_per_node` ranks on each of `nodes` SLURM nodes and plan it.

    Args:
        gpus: whether the ranks compute on GPUs.
        arguments: further arguments of `fusiontree train`.
        cores: cores of each rank.

    Raises:
        UserError: as in `plan_hosts`.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes with {ranks_per_node} ranks each; both must be at least 1")
    _check(config, nodes * ranks_per_node)
    accelerator = "cuda" if gpus else "cpu"
    threads = {} if gpus and "OMP_NUM_THREADS" not in os.environ else {"OMP_NUM_THREADS": _omp_threads(cores)}
    return Plan(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        program=_program(config, arguments),
        environment={**forwarded(os.environ), **threads, "DS_ACCELERATOR": accelerator, **options.environment},
        master_address="",
        master_port=0,
        setup=options.setup,
    )


def launch_options(pairs: Iterable[str], file: Path | None, setup: Iterable[str]) -> LaunchOptions:
    """Read ``--env``, ``--env-file`` (KEY=VALUE lines, # comments) and ``--pre-command``; pairs override the file.

    Values of the file may be enclosed in quotes. Those of ``--env`` are exact, because a shell has removed its quotes.

    Raises:
        UserError: no such file, it is not text, or an entry is not KEY=VALUE.
    """
    environment = {}
    if file is not None:
        if not file.is_file():
            raise UserError(f"--env-file {file} does not exist; give a file of KEY=VALUE lines")
        environment = {key: _unquote(value) for key, value in _assignments(str(file), read_text(file).splitlines())}
    return LaunchOptions({**environment, **dict(_assignments("--env", pairs))}, tuple(setup))


def _assignments(where: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each KEY=VALUE line, without comments and empty lines."""
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise UserError(f"{where}: {line!r} is not of the form KEY=VALUE")
        yield key.strip().removeprefix("export ").strip(), value


def _unquote(value: str) -> str:
    """Return `value` without surrounding spaces, and without quotes that enclose all of it."""
    value = value.strip()
    with contextlib.suppress(ValueError):  # a quote that is not closed belongs to the value
        if value[:1] in ("'", '"') and len(words := shlex.split(value)) == 1:
            return words[0]
    return value


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environment` that every rank gets unchanged, without secrets."""
    names = sorted(name for name in environment if name.startswith(FORWARDED) and not _SECRET.search(name))
    return {name: environment[name] for name in names if name not in (LAUNCH_FOLDER, "CUDA_VISIBLE_DEVICES")}


def network_settings(environment: Mapping[str, str]) -> list[str]:
    """Return the network libraries' variables as NAME=value lines for a job's log."""
    return [f"{name}={environment[name]}" for name in sorted(environment) if name.startswith(_NETWORK)]


def _deepspeed_environment() -> dict[str, str]:
    """Return the variables of the user's DeepSpeed environment files, as DeepSpeed's own launcher would set them."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [folder / name for folder in (Path.home(), Path()) if (folder / name).is_file()]
    assignments = [pair for file in files for pair in _assignments(str(file), read_text(file).splitlines())]
    return {key: value.strip() for key, value in assignments}


def world_info(hosts: Mapping[str, Sequence[int]]) -> str:
    """Encode the devices on every host for DeepSpeed's node launcher (``--world_info``)."""
    return base64.urlsafe_b64encode(json.dumps({host: list(slots) for host, slots in hosts.items()}).encode()).decode()


def prepare_run(config: RunConfig, allow_changed: Sequence[str] = ()) -> Path:
    """Create the run's folder with its configuration and ``logs/``, and return its absolute path.

    Args:
        allow_changed: dotted keys, or tables, that may differ from those of the run's checkpoints.

    Raises:
        UserError: the folder contains something else, or checkpoints of a run with other values.
    """
    run = config.run_dir.absolute()
    refuse_foreign(run)
    if (run / CHECKPOINTS).is_dir():
        try:
            before = load_config(str(run / CONFIG_FILE))
        except UserError as error:  # the ranks compare with the newest checkpoint's
            console.print(f"{error}; it is written again")
        else:
            check_changes(before, config, allow_changed)
    (run / LOGS).mkdir(parents=True, exist_ok=True)
    write_atomic(run / CONFIG_FILE, to_yaml(config))
    return run


def _check(config: RunConfig, ranks: int) -> None:
    """Raise UserError if batch, DeepSpeed settings or dataset cannot run on `ranks` ranks."""
    config.accumulation_steps(ranks)
    check_deepspeed_file(config)
    check_data(config)


def _program(config: RunConfig, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the training program; it reads the run's copy of the configuration, safe from edits while a job waits."""
    return ("fusiontree", "train", str(config.run_dir.absolute() / CONFIG_FILE), *arguments)


def _omp_threads(cores: int) -> str:
    """Return a rank's threads: OMP_NUM_THREADS of the launch if set, else one for each of the rank's `cores`."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores))


def rendezvous_port(offset: int) -> int:
    """Return a free port for rank 0; jobs that start at once on one node search from different `offset` values."""
    return free_port(_FIRST_PORT + offset % _PORTS)


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES would list them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)
    if not present or chosen is None:
        return present
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _devices(gpus: list[str], ranks: int) -> tuple[int, ...] | None:
    """Return the GPUs of `ranks` ranks, or None if DeepSpeed's default, the first GPUs, is right."""
    if not gpus:  # DS_ACCELERATOR asks for GPUs that have no /dev/nvidia*
        return None
    if ranks > len(gpus):
        raise UserError(
            f"--local {ranks} needs {ranks} GPUs, but this machine has {len(gpus)}: {','.join(gpus)}; start fewer"
        )
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return None
    if not all(name.isdecimal() for name in gpus):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={','.join(gpus)}: DeepSpeed's launcher takes only indices; set indices, e.g. 0,1"
        )
    return tuple(map(int, gpus[:ranks]))
