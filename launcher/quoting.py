"""Quoting for the places that interpret a job's values: pdsh, sbatch directives, and names in shell scripts.

Shell scripts quote their words by `shlex.quote`, which is exact for every string. The other places cannot express some
strings, and these are refused. Sources: pdsh(1), ``_get_argument`` in sbatch's ``opt.c`` and "filename pattern" in
sbatch(1) of SLURM 22.05.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from fusiontree.errors import UserError
from fusiontree.files import has_control_characters

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_variable_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that a shell's ``export`` cannot set."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"environment variable {name!r} cannot be passed to the ranks; use only letters, digits and '_' in its "
                "name, or unset it"
            )


def check_one_line(what: str, value: str | Path) -> None:
    """Raise UserError if `value`, described by `what`, contains a newline or another control character."""
    if has_control_characters(str(value)):
        raise UserError(f"{what} {str(value)!r} contains a control character; remove it")


def pdsh_command(*words: str) -> str:
    """Quote a command for pdsh, which expands %h, %n and %u in it and passes it to a shell on each host."""
    return shlex.join(words).replace("%", "%%")


def directive(option: str) -> str:
    """Return the ``#SBATCH`` line of `option`.

    Raises:
        UserError: it contains a control character; a newline would end the directive.
    """
    check_one_line("sbatch's option", option)
    return f"#SBATCH {option}"


def directive_value(value: str) -> str:
    """Quote the value of an option in an ``#SBATCH`` line."""
    return value if _PLAIN.fullmatch(value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def check_log_folder(folder: Path) -> None:
    r"""Raise UserError if SLURM would write its logs elsewhere: it expands % in their paths, and \ turns that off."""
    found = next((character for character in "%\\" if character in str(folder)), None)
    if found is not None:
        raise UserError(f"SLURM cannot write logs to {folder}: it interprets '{found}'; set another output or name")


def check_mount(folder: Path) -> None:
    """Raise UserError if a container's list of mounts, SOURCE:TARGET[,...], cannot express `folder`."""
    found = next((character for character in ":," if character in str(folder)), None)
    if found is not None:
        raise UserError(f"folder {folder} cannot be mounted in a container: its path contains '{found}'; rename it")
