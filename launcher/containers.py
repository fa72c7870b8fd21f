"""How a task of the sbatch script gets into a container: by apptainer, by SLURM itself, or by pyxis.

Options as in apptainer 1.4's ``exec --help``, srun(1) of SLURM 22.05, and the usage page of pyxis.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusiontree.errors import UserError

_OCI = "oci:"


@dataclass(frozen=True)
class Entry:
    """What stands where in the srun command, so that a task runs inside; by default, outside of any container."""

    options: tuple[str, ...] = ()  # of srun, a line each
    first: str = ""  # what a task's shell does before all else
    before: str = ""  # words before the ranks' program, of a process that stays around it
    python: str | None = None  # the image's; None: the one that launched


def entry(image: str | None, mounts: str | None, folders: Sequence[Path], gpus: bool) -> Entry:
    """The way into `image`.

    Args:
        image: ``oci:BUNDLE`` for SLURM's own containers; a .sif file or a folder for apptainer; else one for pyxis.
        mounts: further ones, SOURCE:TARGET[,...].
        folders: whole paths that must be inside as they are outside; the current one is, always.
        gpus: whether the ranks compute on GPUs.

    Raises:
        UserError: mounts for a bundle, which has its own.
    """
    if image is None:
        return Entry()
    bound = _apart([Path(os.getcwd()), *folders])
    if image.startswith(_OCI):
        return _oci(image.removeprefix(_OCI), mounts)
    if image.endswith(".sif") or Path(image).is_dir():
        return _apptainer(image, [*map(str, bound), *([mounts] if mounts else [])], gpus)
    return _pyxis(image, [*(f"{folder}:{folder}" for folder in bound), *([mounts] if mounts else [])])


def _apart(folders: Sequence[Path]) -> list[Path]:
    """`folders` without those that lie in another of them."""
    kept: list[Path] = []
    for folder in sorted(folders, key=lambda path: len(path.parts)):
        if not any(folder.is_relative_to(other) for other in kept):
            kept.append(folder)
    return kept


def _apptainer(image: str, binds: Sequence[str], gpus: bool) -> Entry:
    words = ["apptainer", "exec", *(["--nv"] if gpus else []), *(word for bind in binds for word in ("--bind", bind))]
    return Entry(before=f"{shlex.join([*words, image])} ", python="python")


def _oci(bundle: str, mounts: str | None) -> Entry:
    if mounts:
        raise UserError(f"--container-mounts {mounts}: an OCI bundle has its own; add them to {bundle}/config.json")
    # a bundle has a folder of its own to begin in, and not every SLURM hands the task's variables in
    first = f': "${{SLURM_PROCID:?is not set inside}}"; cd {shlex.quote(os.getcwd())} || exit; '
    return Entry((f"--container={shlex.quote(bundle)}",), first, python="python")


def _pyxis(image: str, mounts: Sequence[str]) -> Entry:
    words = f"--container-image={shlex.quote(image)} --container-mounts={shlex.quote(','.join(mounts))}"
    return Entry((f"{words} --container-workdir={shlex.quote(os.getcwd())}",), python="python")
