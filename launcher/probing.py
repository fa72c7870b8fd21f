"""Run `fusiontree probe` on the nodes that a job would have, before the job."""

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
from fusiontree.distributed.ports import free_port
from fusiontree.errors import RunError, UserError
from launcher import hostfile, multihost, slurm
from launcher.job import FIRST_PORT, PORTS, LaunchOptions, Plan, plan_program


def probe_cluster(config: RunConfig, nodes: int, ranks_per_node: int, hosts: Path | None) -> dict[str, Any] | None:
    """What the probe has found on the hosts of `hosts`, or of the allocation around this; None if there is neither.

    Raises:
        UserError: a host cannot be used, or there are fewer than `nodes`.
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
                raise UserError(f"--nodes {nodes}: {hosts} names {len(slots)}")
            plan = plan_program(("fusiontree", "probe", str(target)), slots, LaunchOptions())
            multihost.check_programs("pdsh")
            multihost.run(plan, folder, "pdsh")
        found: dict[str, Any] = json.loads(target.read_text())
        return found


@contextlib.contextmanager
def _shared_folder(config: RunConfig) -> Iterator[Path]:
    """A folder beside the run's, which all nodes must share anyway, for as long as the block runs."""
    made = not config.output.exists()
    config.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".probe-", dir=config.output.absolute()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        if made:
            with contextlib.suppress(OSError):  # something else is there by now
                config.output.rmdir()


def _under_slurm(nodes: int, ranks_per_node: int, target: Path) -> None:
    given = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    if len(given) < nodes:
        raise UserError(f"--nodes {nodes}: the allocation has {len(given)} ({' '.join(given)})")
    port = free_port(FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS)
    plan = Plan(nodes, ranks_per_node, ("fusiontree", "probe", str(target)), {}, given[0], port)
    environment = {**os.environ, "MASTER_ADDR": plan.master_address, "MASTER_PORT": str(plan.master_port)}
    done = subprocess.run(slurm.command(plan), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunError(f"the probe failed on {' '.join(given)}: {lines[-1] if lines else f'code {done.returncode}'}")
