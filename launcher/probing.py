"""Runs of `fusiontree probe` on the nodes of a future job."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.config import RunConfig
from fusiontree.errors import RunError, UserError
from launcher import hostfile, multihost, slurm
from launcher.job import LaunchOptions, Plan, plan_program, rendezvous_port


def probe_cluster(config: RunConfig, nodes: int, ranks_per_node: int, hosts: Path | None) -> dict[str, Any] | None:
    """Return the probe's findings on the hosts of a hostfile, else of the current allocation; None without either.

    Args:
        hosts: path of the hostfile.

    Raises:
        UserError: a host cannot be used, or there are fewer hosts than `nodes`.
        RunError: the probe failed.
    """
    if hosts is None and "SLURM_JOB_ID" not in os.environ:
        return None
    with _shared_folder(config) as folder:
        target = folder / "probe.json"
        if hosts is None:
            _under_slurm(nodes, ranks_per_node, target)
        else:
            slots = dict(list(hostfile.read(hosts).items())[:nodes])
            if len(slots) < nodes:
                raise UserError(f"--nodes {nodes}: {hosts} lists only {len(slots)}; lower --nodes or add hosts")
            plan = plan_program(("fusiontree", "probe", str(target)), slots, LaunchOptions())
            multihost.check_programs("pdsh")
            multihost.run(plan, folder, "pdsh")
        findings: dict[str, Any] = json.loads(target.read_text())
        return findings


@contextlib.contextmanager
def _shared_folder(config: RunConfig) -> Iterator[Path]:
    """Create a folder in the run's output, which all nodes share, and remove it after the block."""
    created = not config.output.exists()
    config.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".probe-", dir=config.output.absolute()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        if created:
            with contextlib.suppress(OSError):  # not empty any more
                config.output.rmdir()


def _under_slurm(nodes: int, ranks_per_node: int, target: Path) -> None:
    allocated = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    if len(allocated) < nodes:
        raise UserError(
            f"--nodes {nodes}: the allocation has only {len(allocated)} ({' '.join(allocated)}); lower --nodes or "
            "allocate more"
        )
    port = rendezvous_port(int(os.environ["SLURM_JOB_ID"]))
    plan = Plan(nodes, ranks_per_node, ("fusiontree", "probe", str(target)), {}, allocated[0], port)
    environment = {**os.environ, "MASTER_ADDR": plan.master_address, "MASTER_PORT": str(plan.master_port)}
    done = subprocess.run(slurm.srun_command(plan), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunError(
            f"the probe failed on {' '.join(allocated)}: {lines[-1] if lines else f'code {done.returncode}'}"
        )
