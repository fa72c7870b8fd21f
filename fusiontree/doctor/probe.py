"""Probe of a cluster: facts about each rank's host, compared, and all-reduce bandwidth; for `fusiontree doctor`."""

import importlib.metadata
import json
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch

from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.files import write_atomic

_PACKAGES = (
    "fusiontree",
    "torch",
    "deepspeed",
    "numpy",
    "triton",
    "mamba-ssm",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
)
_SIZES = {"cuda": (2**20, 2**28), "cpu": (2**16, 2**24)}  # bytes of the all-reduces
_REPEATS = 5


def probe(target: Path) -> None:
    """Inspect this rank's host, measure all-reduces over all ranks, and let rank 0 write the findings to `target`."""
    world = collectives.start()
    facts = collectives.gather(_facts(world))
    rates = {str(size): _all_reduce(world, size) for size in _SIZES[world.device.type]}
    if world.is_main:
        write_atomic(target, json.dumps({"ranks": facts, "all_reduce": rates}))
    collectives.leave()


def _facts(world: World) -> dict[str, Any]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "unknown"
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "host": name,
        "address": address,
        "interfaces": [interface for _, interface in socket.if_nameindex() if interface != "lo"],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "gpu": gpu,
        "gpu_memory_bytes": torch.cuda.get_device_properties(world.device).total_memory if gpu else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _all_reduce(world: World, size: int) -> dict[str, float]:
    """Return the seconds of an all-reduce of `size` bytes, the best of `_REPEATS`, and its bus bandwidth in GB/s.

    Bus bandwidth counts 2 (n - 1) / n bytes per byte of `size`, the traffic of each link, as nccl-tests does.
    """
    tensor = torch.ones(size // 4, device=world.device)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first all-reduce opens the connections
        collectives.barrier()
        start = time.perf_counter()
        collectives.sum_over_ranks(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "bus_gb_per_s": size * 2 * (world.size - 1) / world.size / best / 1e9}


def compare(findings: dict[str, Any]) -> dict[str, Any]:
    """Return the hosts, the all-reduce rates and the problems, one line each, from the findings of `probe`."""
    ranks = findings["ranks"]
    hosts = {rank["host"]: rank for rank in ranks}
    first = ranks[0]
    problems = [
        f"{package} is {rank['versions'][package]} on {rank['host']}, {first['versions'][package]} on {first['host']}; "
        "install one version on all hosts"
        for rank in hosts.values()
        for package in rank["versions"]
        if rank["versions"][package] != first["versions"][package]
    ]
    problems += [
        f"{name} is {rank[name]} on {rank['host']}, {first[name]} on {first['host']}; use equal nodes"
        for rank in hosts.values()
        for name in ("nccl", "gpu")
        if rank[name] != first[name]
    ]
    problems += [
        f"host {rank['host']} resolves its own name to {rank['address']}, which other hosts cannot reach; fix "
        "/etc/hosts, or name an interface: --env GLOO_SOCKET_IFNAME=... and NCCL_SOCKET_IFNAME=..."
        for rank in hosts.values()
        if len(hosts) > 1 and (rank["address"].startswith("127.") or rank["address"] == "unknown")
    ]
    shown = {name: f"{rank['address']} ({', '.join(rank['interfaces'])})" for name, rank in hosts.items()}
    return {"hosts": shown, "ranks": len(ranks), "all_reduce": findings["all_reduce"], "problems": problems}
