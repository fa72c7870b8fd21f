"""``fusiontree launch``: training on this machine, on the hosts of a hostfile, or on a SLURM cluster."""

import argparse
from pathlib import Path
from typing import Any

from fusiontree.cli.parsing import add_config, add_resume, command, local_path
from fusiontree.cli.stdout import print_result, results
from fusiontree.errors import UserError
from fusiontree.paths import expand_home
from fusiontree.run.folder import LOGS


def _launch(args: argparse.Namespace) -> int:
    from fusiontree.config import load_config
    from launcher import local
    from launcher.job import launch_options, plan_local

    options = launch_options(args.env, args.env_file, args.pre_command)
    _refuse_other_targets(args)
    if args.slurm:
        return _launch_slurm(args, options)
    if args.hostfile is not None:
        return _launch_hosts(args, options)
    config = load_config(args.config, args.overrides)
    plan = plan_local(config, args.config, [*args.overrides, *_rank_options(args)], args.local, options)
    if args.dry_run:
        print_result(local.command_line(plan))
        return 0
    return local.run(plan, config.run_dir / LOGS)


def _rank_options(args: argparse.Namespace) -> list[str]:
    """Return the options that every rank's ``fusiontree train`` gets from the launch."""
    options = [f"--allow-changed={key}" for key in args.allow_changed]
    if args.trust_checkpoint:
        options.append("--trust-checkpoint")
    return [*options, "--json"] if args.json else options


# options that only one target has
_TARGET_OPTIONS = {
    "--hostfile": ("launcher", "include", "exclude"),
    "--slurm": (
        *("nodes", "min_nodes", "gpus_per_node", "ranks_per_node", "cpus_per_task", "tasks", "partition", "account"),
        *("qos", "time", "constraint", "container", "container_mounts", "sbatch", "sweep", "save_ahead", "wait"),
    ),
}


def _refuse_other_targets(args: argparse.Namespace) -> None:
    """Raise UserError for an option of another target, which would have no effect."""
    target = "--slurm" if args.slurm else "--hostfile" if args.hostfile is not None else "--local"
    for owner, names in _TARGET_OPTIONS.items():
        for name in names if owner != target else ():
            if getattr(args, name) not in (None, [], False):
                raise UserError(f"--{name.replace('_', '-')} belongs to {owner}, not to {target}; remove it")


def _launch_hosts(args: argparse.Namespace, options: Any) -> int:
    from fusiontree.config import load_config
    from launcher import hostfile, multihost
    from launcher.job import plan_hosts, prepare_run

    config = load_config(args.config, args.overrides)
    hosts = hostfile.read(args.hostfile, args.include or "", args.exclude or "")
    plan = plan_hosts(config, hosts, _rank_options(args), options)
    launcher = args.launcher or "pdsh"
    if args.dry_run:
        print_result(multihost.command_line(plan, launcher, config.run_dir.absolute()))
        return 0
    multihost.check_programs(launcher)
    return multihost.run(plan, prepare_run(config, args.allow_changed), launcher)


def _launch_slurm(args: argparse.Namespace, options: Any) -> int:
    from fusiontree.config import load_config
    from launcher import sbatch, slurm
    from launcher.job import plan_slurm, prepare_run

    config = load_config(args.config, args.overrides)
    nodes = 1 if args.nodes is None else args.nodes
    ranks = args.gpus_per_node if args.ranks_per_node is None else args.ranks_per_node
    if ranks is None:
        raise UserError("--slurm needs --gpus-per-node G, or --ranks-per-node N for ranks on CPUs")
    sweep = sbatch.Sweep.from_axes(config.name, args.sweep)
    configs = [load_config(args.config, [*args.overrides, *changes]) for changes in sweep.runs]
    min_nodes = nodes if args.min_nodes is None else max(1, args.min_nodes)
    # the time reserved for a save assumes the fewest nodes, which write it most slowly
    save_ahead = sbatch.estimate_save_ahead(config, min_nodes) if args.save_ahead is None else args.save_ahead
    job = _job_options(args, save_ahead)
    cores = max(1, (job.cpus_per_task or 1) // (1 if job.tasks == "rank" else ranks))
    gpus, train_options = args.gpus_per_node is not None, _rank_options(args)
    plans = [plan_slurm(one, nodes, ranks, gpus, train_options, options, cores) for one in configs]
    sbatch.check_options(job, nodes)
    for one in configs:
        one.accumulation_steps(min_nodes * ranks)  # a job that has lost nodes must be able to resume
    folder = config.run_dir.absolute()
    text = sbatch.render(plans[0], job, [one.run_dir.absolute() for one in configs], folder / LOGS)
    if args.dry_run:
        print_result(text, end="")
        return 0
    slurm.check_cluster(job.partition)
    if job.time is None and (limit := slurm.default_time_limit(job.partition)):
        sbatch.check_time_limit(f"the partition's time limit {limit}", limit, job.save_ahead)
    for one in configs:
        prepare_run(one, args.allow_changed)
    return _submit(sbatch.write_script(text, folder), folder / LOGS, args.wait)


def _job_options(args: argparse.Namespace, save_ahead: int) -> Any:
    from launcher.sbatch import JobOptions

    return JobOptions(
        gpus_per_node=args.gpus_per_node,
        min_nodes=args.min_nodes,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        time=args.time,
        constraint=args.constraint,
        cpus_per_task=args.cpus_per_task,
        extra=tuple(args.sbatch),
        container=args.container and expand_home(args.container),
        container_mounts=args.container_mounts and ",".join(map(expand_home, args.container_mounts.split(","))),
        tasks=args.tasks or "rank",
        save_ahead=save_ahead,
    )


def _submit(script: Path, logs: Path, wait: bool) -> int:
    from launcher import slurm

    job = slurm.submit(script)
    print_result(
        f"job {job}: {script}\nfollow it with  tail -F {logs}/slurm-{job}*.log\ncancel it with  scancel {job}",
        flush=True,
    )
    return slurm.follow(job, logs, results()) if wait else 0


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    launch = command(
        commands,
        "launch",
        _launch,
        "Train on several ranks: on this machine, on the hosts of a hostfile, or on a SLURM cluster.",
        "launch tiny --local 2 data.path=data/books",
    )
    launch.set_defaults(has_children=True)
    add_config(launch)
    add_resume(launch)
    target = launch.add_mutually_exclusive_group(required=True)
    target.add_argument("--local", type=int, metavar="N", help="start N ranks on this machine")
    target.add_argument(
        "--hostfile",
        type=local_path,
        metavar="FILE",
        help="start ranks over ssh; FILE has one line `NAME slots=N` per host",
    )
    target.add_argument("--slurm", action="store_true", help="submit a job to SLURM")
    launch.add_argument("--dry-run", action="store_true", help="print the command or script and exit")
    launch.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable of every rank; repeatable"
    )
    launch.add_argument(
        "--env-file", type=local_path, metavar="FILE", help="file of environment variables, one KEY=VALUE per line"
    )
    launch.add_argument(
        "--pre-command",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line to run first on every node, e.g. 'module load cuda'; repeatable",
    )
    _add_hostfile(launch)
    _add_slurm(launch)


def _add_hostfile(launch: argparse.ArgumentParser) -> None:
    group = launch.add_argument_group("with --hostfile")
    group.add_argument("--launcher", choices=("pdsh", "openmpi"), help="program that reaches the hosts (default pdsh)")
    group.add_argument("--include", metavar="HOSTS", help="slots to use, HOST[:SLOT,...][@HOST...]")
    group.add_argument("--exclude", metavar="HOSTS", help="slots to leave out, in the same form")


def _add_slurm(launch: argparse.ArgumentParser) -> None:
    group = launch.add_argument_group("with --slurm")
    group.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default 1)")
    group.add_argument(
        "--min-nodes", type=int, metavar="N", help="start and resume on as few as N nodes, e.g. after losing some"
    )
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs per node, with one rank each")
    group.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="ranks per node (default: --gpus-per-node); without --gpus-per-node, ranks on CPUs",
    )
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="cores per task")
    group.add_argument("--tasks", choices=("rank", "node"), help="start one task per rank or per node (default rank)")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", metavar="NAME", help=f"sbatch's --{name}")
    group.add_argument("--time", metavar="LIMIT", help="time limit of each attempt, in sbatch's format")
    group.add_argument(
        "--save-ahead", type=int, metavar="S", help="save S seconds before the time limit (default: estimated)"
    )
    group.add_argument(
        "--container",
        metavar="IMAGE",
        help="a .sif file or folder (apptainer), oci:BUNDLE (SLURM's own containers), or an image name (pyxis)",
    )
    group.add_argument(
        "--container-mounts",
        metavar="FROM:TO[,...]",
        help="more mounts; the current folder and the run's are always mounted",
    )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="more #SBATCH options, e.g. '--exclusive'; repeatable",
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="submit a job array with one run per value; repeat it for the product of several keys",
    )
    group.add_argument("--wait", action="store_true", help="follow the job's log and exit with the job's exit code")
