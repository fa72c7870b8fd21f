"""Diagnosis of a machine: versions, devices, kernels, memory and disk, and the problems that a run would have."""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig, check_deepspeed_file
from fusiontree.doctor import memory
from fusiontree.errors import UserError, typed_cause
from fusiontree.run.datasets import check_data

# distribution: module; FusionTree does not run without the required ones
_REQUIRED = {"torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "webdataset": "webdataset"}
_OPTIONAL = {
    "triton": "triton",
    "mamba-ssm": "mamba_ssm",
    "flash-attn-4": "flash_attn.cute",
    "flash-attn": "flash_attn",
    "liger-kernel": "liger_kernel",
    "wandb": "wandb",
}


def diagnose(config: RunConfig | None, ranks: int = 1, nodes: int | None = None) -> dict[str, Any]:
    """Diagnose this machine and, with `config`, whether a run on `ranks` ranks fits on it.

    Args:
        config: the run's configuration; None: diagnose the machine only.
        ranks: ranks of the run, per node.
        nodes: nodes of a job on a cluster; kernels, GPUs and memory of this machine are then not checked.

    Returns:
        versions, machine, kernels (by operation), install (advice, one line each), problems (reasons why nothing, or
        not `config`, can run; empty if it can) and, with a configuration, run (its size, and memory in bytes).
    """
    problems: list[str] = []
    with contextlib.redirect_stdout(sys.stderr):  # some packages print on import; stdout is for the report
        versions = _versions(problems)
    if any(problem.startswith("torch ") for problem in problems):
        return {"versions": versions, "machine": _machine([]), "kernels": {}, "install": [], "problems": problems}
    from fusiontree.device import accelerator

    gpus, device_type = _gpus(), accelerator()
    report: dict[str, Any] = {
        "versions": versions,
        "machine": _machine(gpus),
        "kernels": _kernels(config, device_type, problems if nodes is None else []),
        "install": _advice(versions, device_type, config),
    }
    if config is not None:
        report["run"] = _estimate(config, (nodes or 1) * ranks)
        problems += _problems(
            lambda: check_deepspeed_file(config),
            lambda: check_data(config),
            lambda: config.accumulation_steps((nodes or 1) * ranks),
            lambda: _check_disk(config),
        )
        if nodes is None:
            problems += _machine_problems(config, ranks, report["run"], gpus if device_type == "cuda" else [])
    return report | {"problems": list(dict.fromkeys(problems))}


def _versions(problems: list[str]) -> dict[str, str]:
    """Return the version of each package, or why it is unusable; add a problem for each unusable required one."""
    versions = {"python": platform.python_version()}
    for name, module in {**_REQUIRED, **_OPTIONAL}.items():
        versions[name], usable = _try_import(name, module)
        if name in _REQUIRED and not usable:
            problems.append(f"{name} is {versions[name]}; install it with `pip install fusiontree`")
    return versions


def _try_import(name: str, module: str) -> tuple[str, bool]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", False
    try:
        importlib.import_module(module)
    except Exception as error:  # e.g. RuntimeError or OSError of a compiled package with a missing library
        return f"{version}, broken: {typed_cause(error)}", False
    return version, True


def _gpus() -> list[dict[str, Any]]:
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": found.name, "memory_bytes": found.total_memory} for found in properties]


def _machine(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory(),
        "gpus": [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in gpus],
    }


def _memory() -> int:
    """Return the bytes that processes may use: the machine's memory, or the container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return machine if text == "max" else min(machine, int(text))


def _kernels(config: RunConfig | None, device_type: str, problems: list[str]) -> dict[str, dict[str, str]]:
    """Return by operation the backend that a run uses and, for each other backend, why it cannot run."""
    from fusiontree.kernels import DTYPES
    from fusiontree.model import kernel_registry

    requested = {} if config is None else config.kernels.model_dump()
    shapes = () if config is None else (config.model, DTYPES[config.precision])
    chosen = {}
    for op in kernel_registry.OPERATIONS:
        try:
            uses = kernel_registry.choose(op, requested.get(op, "auto"), device_type, *shapes)
        except ValueError as error:
            problems.append(str(error))
            uses = "none"
        reasons = kernel_registry.available(op, device_type, *shapes)
        chosen[op] = {"uses": uses, **{name: reason or "can run" for name, reason in reasons.items() if name != uses}}
    return chosen


def _advice(versions: dict[str, str], device_type: str, config: RunConfig | None) -> list[str]:
    missing = [name for name in ("mamba-ssm", "liger-kernel") if versions[name] == "not installed"]
    if versions["flash-attn"] == versions["flash-attn-4"] == "not installed":
        missing.append("flash-attn-4 or flash-attn")
    advice = []
    if device_type == "cuda" and missing:
        advice.append(f"pip install --no-build-isolation 'fusiontree[cuda]': faster kernels ({', '.join(missing)})")
    if config is not None and config.logging.wandb and versions["wandb"] == "not installed":
        advice.append("pip install 'fusiontree[wandb]': logging.wandb is true")
    return advice


def _estimate(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the size of the run, the memory of one of `ranks` ranks, and the disk space of its checkpoints.

    Memory is left out if the DeepSpeed settings are invalid; the problems name the reason.
    """
    sizes: dict[str, Any] = {"parameters": config.model.parameter_count(), "ranks": ranks}
    with contextlib.suppress(UserError):
        sizes["rows_per_rank_and_step"] = config.accumulation_steps(ranks) * config.batch.micro_rows
    with contextlib.suppress(UserError):
        sizes |= memory.estimate(config, ranks)
    sizes["memory_gib_by_stage_and_recomputation"] = memory.table(config, ranks)
    sizes |= {"checkpoint_bytes": memory.checkpoint_bytes(config), "checkpoints_bytes": memory.disk_bytes(config)}
    return sizes


def _machine_problems(config: RunConfig, ranks: int, run: dict[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    """Return the reasons why `ranks` ranks of `config` cannot run on this machine."""
    name = gpus[0]["name"] if gpus else None
    available = min(gpu["memory_bytes"] for gpu in gpus) if gpus else _memory()
    return _problems(
        lambda: _check_devices(config, ranks, gpus), lambda: _check_memory(run, ranks, available, name, "this machine")
    )


def node_problems(run: dict[str, Any], ranks: list[dict[str, Any]]) -> list[str]:
    """Return a line for each host whose memory is too small for `run`.

    Args:
        run: `diagnose`'s figures of the run.
        ranks: the probe's facts about each rank's host.
    """
    hosts = {rank["host"]: rank for rank in ranks}
    counts = Counter(rank["host"] for rank in ranks)
    return _problems(
        *(
            functools.partial(
                _check_memory,
                run,
                counts[host],
                rank["gpu_memory_bytes"] or rank["memory_bytes"],
                rank["gpu"] and f"{rank['gpu']} of {host}",
                host,
            )
            for host, rank in hosts.items()
        )
    )


def _problems(*checks: Callable[[], Any]) -> list[str]:
    """Return the messages of the checks that fail."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_devices(config: RunConfig, ranks: int, gpus: list[dict[str, Any]]) -> None:
    import torch

    from fusiontree.kernels import check_precision

    if gpus and ranks > len(gpus):
        raise UserError(f"{ranks} ranks need {ranks} GPUs, but this machine has {len(gpus)}; start fewer ranks")
    if gpus and config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision bf16 is not supported by {gpus[0]['name']}; set precision=fp32")
    check_precision(config.precision, torch.device("cuda" if gpus else "cpu"))


def _check_memory(run: dict[str, Any], ranks: int, available: int, gpu: str | None, host: str) -> None:
    """Raise UserError if `available` bytes, of `gpu` or else shared by `ranks` ranks on `host`, are too few."""
    needed = run.get("memory_per_rank_bytes", 0) * (1 if gpu else ranks)
    if needed > available:
        needs = (
            f"a rank on {gpu} needs"
            if gpu
            else f"{ranks} ranks on {host} need"
            if ranks > 1
            else f"a rank on {host} needs"
        )
        raise UserError(
            f"{needs} about {needed / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB is available; "
            + _remedy(run, available / 2**30 / (1 if gpu else ranks))
        )


def _remedy(run: dict[str, Any], gib: float) -> str:
    """Return the first settings of the run's memory table that fit a rank in `gib` GiB, else advice to reduce work."""
    for stage, needs in run.get("memory_gib_by_stage_and_recomputation", {}).items():
        for policy, needed in needs.items():
            if needed <= gib:
                return f"set deepspeed={stage} and activation_checkpointing={policy}, which need {needed:.1f} GiB"
    return "lower batch.micro_rows or data.seq_len, use more ranks with deepspeed=zero3, or use a smaller preset"


def _check_disk(config: RunConfig) -> None:
    """Raise UserError if the disk of the run's folder is too small for its checkpoints."""
    folder = next(path for path in [config.run_dir.absolute(), *config.run_dir.absolute().parents] if path.exists())
    free, needed = shutil.disk_usage(folder).free, memory.disk_bytes(config)
    if needed > free:
        each = memory.checkpoint_bytes(config) / 2**30
        raise UserError(
            f"checkpoints take up to {needed / 2**30:.1f} GiB ({each:.1f} GiB each), but {folder} has "
            f"{free / 2**30:.1f} GiB free; lower checkpoint.keep_last or change output"
        )
