"""Containers for the ranks of an sbatch script: apptainer, SLURM's own OCI containers, pyxis.

Sources of the options: ``apptainer exec --help`` of apptainer 1.4, srun(1) of SLURM 22.05, the usage page of pyxis.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusiontree.errors import UserError
from launcher import quoting

_OCI = "oci:"


@dataclass(frozen=True)
class ContainerCommand:
    """The parts of an srun command that run a task inside a container; by default there is no container."""

    srun_options: tuple[str, ...] = ()  # one per line of the script
    shell_setup: str = ""  # shell commands before all others of a task
    prefix: str = ""  # words before the ranks' program, of a process that stays its parent
    python: str | None = None  # the image's Python; None: the Python of the launch


def container_command(image: str | None, mounts: str | None, folders: Sequence[Path], gpus: bool) -> ContainerCommand:
    """Return the parts of the srun command that run a task inside `image`.

    Args:
        image: ``oci:BUNDLE`` for SLURM's own containers; a .sif file or a folder for apptainer; any other for pyxis.
        mounts: further mounts, SOURCE:TARGET[,...].
        folders: absolute paths to mount at the same path; the current folder always is.
        gpus: whether the ranks compute on GPUs.

    Raises:
        UserError: mounts for an OCI bundle, which defines its own; or a folder that a list of mounts cannot express.
    """
    if image is None:
        return ContainerCommand()
    if image.startswith(_OCI):
        return _oci(image.removeprefix(_OCI), mounts)
    bound = _outermost([Path(os.getcwd()), *folders])
    for folder in bound:
        quoting.check_mount(folder)
    if image.endswith(".sif") or Path(image).is_dir():
        return _apptainer(image, [*map(str, bound), *([mounts] if mounts else [])], gpus)
    return _pyxis(image, [*(f"{folder}:{folder}" for folder in bound), *([mounts] if mounts else [])])


def _outermost(folders: Sequence[Path]) -> list[Path]:
    """Return `folders` without those inside another of them."""
    kept: list[Path] = []
    for folder in sorted(folders, key=lambda path: len(path.parts)):
        if not any(folder.is_relative_to(other) for other in kept):
            kept.append(folder)
    return kept


def _apptainer(image: str, binds: Sequence[str], gpus: bool) -> ContainerCommand:
    words = ["apptainer", "exec", *(["--nv"] if gpus else []), *(word for bind in binds for word in ("--bind", bind))]
    return ContainerCommand(prefix=f"{shlex.join([*words, image])} ", python="python")


def _oci(bundle: str, mounts: str | None) -> ContainerCommand:
    if mounts:
        raise UserError(
            f"--container-mounts {mounts}: an OCI bundle defines its own mounts; add them to {bundle}/config.json"
        )
    # a bundle starts in its own folder, and some versions of SLURM do not set the task's variables inside
    setup = f': "${{SLURM_PROCID:?is not set inside}}"; cd {shlex.quote(os.getcwd())} || exit; '
    return ContainerCommand((f"--container={shlex.quote(bundle)}",), setup, python="python")


def _pyxis(image: str, mounts: Sequence[str]) -> ContainerCommand:
    words = f"--container-image={shlex.quote(image)} --container-mounts={shlex.quote(','.join(mounts))}"
    return ContainerCommand((f"{words} --container-workdir={shlex.quote(os.getcwd())}",), python="python")
