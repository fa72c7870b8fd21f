"""The plan of a job: which ranks run what, with which environment and meeting where. Made before any process starts."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusiontree.config import RunConfig, deepspeed_json, load_config, to_yaml
from fusiontree.distributed.outcome import LAUNCH_FOLDER
from fusiontree.distributed.ports import free_port
from fusiontree.errors import UserError
from fusiontree.files import refuse_existing, write_atomic
from fusiontree.run.changes import check_changes
from fusiontree.run.data import check_data
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, LOGS

FIRST_PORT, PORTS = 20_000, 10_000  # of a rendezvous: below the range from which systems give ports to clients

# what the network libraries and the kernels take from the environment; a user's settings reach every rank
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
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")  # never written into a script or shown in a process list


@dataclass(frozen=True)
class LaunchOptions:
    """What a user puts around the ranks' program."""

    environment: Mapping[str, str] = field(default_factory=dict)  # variables, on top of all others
    setup: tuple[str, ...] = ()  # shell lines that run first on every node: modules, conda


@dataclass(frozen=True)
class Plan:
    """A job that can start; each kind of launch renders it in its own way."""

    nodes: int
    ranks_per_node: int
    program: tuple[str, ...]  # Python module that every rank runs, then its arguments
    environment: Mapping[str, str]  # variables on top of the caller's own
    master_address: str  # rendezvous: where rank 0 listens; empty: on the first node that the scheduler gives
    master_port: int  # 0: one that is free there when the job starts
    devices: tuple[int, ...] | None = None  # GPUs of a node by index, one a rank; None: the first ones, or CPUs
    hosts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # a hostfile's: the slots taken on each host
    setup: tuple[str, ...] = ()  # shell lines that run first on every node

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return sum(map(len, self.hosts.values())) or self.nodes * self.ranks_per_node


def plan_local(
    config: RunConfig, source: str, overrides: Sequence[str], ranks: int, options: LaunchOptions = LaunchOptions()
) -> Plan:
    """Plan `ranks` ranks of training on this machine, after checking all that can be checked without starting them.

    Args:
        config: what `source` and `overrides` say; the ranks read them again.

    Raises:
        UserError: the batch does not divide, the dataset or the DeepSpeed settings are missing or wrong, or there are
            fewer GPUs than ranks.
    """
    if ranks < 1:
        raise UserError(f"--local {ranks}: give the number of ranks, at least 1")
    _check(config, ranks)
    gpus = visible_gpus()
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if gpus else "cpu")
    return Plan(
        nodes=1,
        ranks_per_node=ranks,
        program=("fusiontree", "train", source, *overrides),
        environment={"DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": _threads(ranks), **options.environment},
        master_address="127.0.0.1",
        master_port=free_port(),
        devices=_devices(gpus, ranks) if accelerator == "cuda" else None,
        setup=options.setup,
    )


def plan_hosts(
    config: RunConfig, hosts: Mapping[str, tuple[int, ...]], arguments: Sequence[str], options: LaunchOptions
) -> Plan:
    """Plan a rank on every slot of `hosts`, which a hostfile gave; rank 0 is on the first host.

    Args:
        arguments: further ones of `fusiontree train`.

    Raises:
        UserError: the batch does not divide, or the dataset or the DeepSpeed settings are missing or wrong.
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
            "OMP_NUM_THREADS": _threads_there(),
            **_deepspeed_file(),
            **options.environment,
        },
        master_address=next(iter(hosts)),
        master_port=free_port(FIRST_PORT + os.getpid() % PORTS),
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
    """Plan `ranks_per_node` ranks on each of `nodes` nodes that SLURM will give.

    Args:
        gpus: whether the ranks compute on GPUs.
        cores: of each rank.
        arguments: further ones of `fusiontree train`.

    Raises:
        UserError: as `plan_hosts`.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes of {ranks_per_node} ranks: give at least 1 of each")
    _check(config, nodes * ranks_per_node)
    accelerator = "cuda" if gpus else "cpu"
    threads = {} if gpus and "OMP_NUM_THREADS" not in os.environ else {"OMP_NUM_THREADS": _threads_there(cores)}
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
    """Read ``--env``, ``--env-file`` (KEY=VALUE lines, # comments) and ``--pre-command``; pairs win over the file.

    Raises:
        UserError: no such file, or a line that is none of KEY=VALUE.
    """
    entries = [("--env", pair) for pair in pairs]
    if file is not None:
        if not file.is_file():
            raise UserError(f"--env-file {file}: no such file")
        entries = [*((str(file), line) for line in file.read_text().splitlines()), *entries]
    environment = {}
    for where, line in entries:
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise UserError(f"{where}: '{text}' is not of the form KEY=VALUE")
        environment[key] = _unquoted(value)
    return LaunchOptions(environment, tuple(setup))


def _unquoted(value: str) -> str:
    """`value` without the quotes that may stand around the whole of it."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return "".join(shlex.split(value))
    return value


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that every rank needs as they are here; never a secret."""
    names = sorted(name for name in environment if name.startswith(FORWARDED) and not _SECRET.search(name))
    return {name: environment[name] for name in names if name not in (LAUNCH_FOLDER, "CUDA_VISIBLE_DEVICES")}


def network_settings(environment: Mapping[str, str]) -> list[str]:
    """The network libraries' variables, a NAME=value line each, for a job's log."""
    return [f"{name}={environment[name]}" for name in sorted(environment) if name.startswith(_NETWORK)]


def _deepspeed_file() -> dict[str, str]:
    """The variables of DeepSpeed's own environment file, which a launch's takes the place of."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = [
        line
        for place in (Path.home(), Path())
        if (place / name).is_file()
        for line in (place / name).read_text().splitlines()
    ]
    return {key.strip(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals}


def prepare_run(config: RunConfig, allow_changed: Sequence[str] = ()) -> Path:
    """Make the run's folder with its configuration and ``logs/``; the whole path of it.

    Args:
        allow_changed: dotted keys, or tables, that may differ from those of a run that has checkpoints there.

    Raises:
        UserError: the folder holds something else, or checkpoints of a run with other values.
    """
    run = config.run_dir.absolute()
    refuse_existing(run, overwrite=True, marker=CONFIG_FILE)
    if (run / CHECKPOINTS).is_dir():
        check_changes(load_config(str(run / CONFIG_FILE)), config, allow_changed)
    (run / LOGS).mkdir(parents=True, exist_ok=True)
    write_atomic(run / CONFIG_FILE, to_yaml(config))
    return run


def _check(config: RunConfig, ranks: int) -> None:
    """Raise UserError if `config` cannot run on `ranks` ranks, as far as it can be told here."""
    config.accumulation_steps(ranks)
    deepspeed_json(config)
    check_data(config)


def _program(config: RunConfig, arguments: Sequence[str]) -> tuple[str, ...]:
    """Train from the run's own copy of its configuration: a file edited while a job waits must not change it."""
    return ("fusiontree", "train", str(config.run_dir.absolute() / CONFIG_FILE), *arguments)


def _threads_there(cores: int = 1) -> str:
    """Threads per rank on machines that cannot be seen from here: the caller's OMP_NUM_THREADS, else one a core."""
    return os.environ.get("OMP_NUM_THREADS") or str(cores)


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES would list them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)
    if not present or chosen is None:
        return present
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _devices(gpus: list[str], ranks: int) -> tuple[int, ...] | None:
    """The GPUs that `ranks` ranks take; None leaves the choice to DeepSpeed, which takes the first ones."""
    if not gpus:  # asked for by DS_ACCELERATOR on a machine that shows its GPUs in another way
        return None
    if ranks > len(gpus):
        raise UserError(
            f"--local {ranks} needs {ranks} GPUs, here are {len(gpus)} ({','.join(gpus)}); start fewer ranks"
        )
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return None
    if not all(name.isdecimal() for name in gpus):
        raise UserError(f"CUDA_VISIBLE_DEVICES={','.join(gpus)}: DeepSpeed's launcher takes indices only, e.g. 0,1")
    return tuple(map(int, gpus[:ranks]))


def _threads(ranks: int) -> str:
    """Threads per rank: the caller's OMP_NUM_THREADS, else the cores shared out."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
