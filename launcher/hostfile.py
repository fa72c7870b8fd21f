"""Hostfile parser with one-line errors, because DeepSpeed's raises bare ValueErrors in its launcher process."""

import re
from collections.abc import Mapping
from pathlib import Path

from fusiontree.errors import UserError
from fusiontree.files import read_text

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # pdsh and ssh interpret other characters, e.g. a leading '-'


def read(path: Path, include: str = "", exclude: str = "") -> dict[str, tuple[int, ...]]:
    """Return the slots to use on each host, in the order of the file.

    Args:
        path: a hostfile in the format of DeepSpeed and Open MPI: one ``NAME slots=N`` per line, # comments.
        include: slots to use, ``HOST[:SLOT,...]`` joined by @; empty: all.
        exclude: slots to leave out, in the same form.

    Raises:
        UserError: no such file, a malformed line or name, a host listed twice or without slots, an unknown host or
            slot.
    """
    if not path.is_file():
        raise UserError(f"--hostfile {path} does not exist; give a file with one line `NAME slots=N` per host")
    if include and exclude:
        raise UserError("--include and --exclude cannot be combined; remove one")
    hosts = _parse(path)
    if include:
        chosen = _selection("--include", include, hosts)
        return {host: slots for host in hosts if (slots := chosen.get(host))}
    excluded = _selection("--exclude", exclude, hosts) if exclude else {}
    kept = {host: tuple(s for s in slots if s not in excluded.get(host, ())) for host, slots in hosts.items()}
    if not any(kept.values()):
        raise UserError(f"--exclude {exclude} leaves no slot of {path}; exclude fewer slots")
    return {host: slots for host, slots in kept.items() if slots}


def _parse(path: Path) -> dict[str, tuple[int, ...]]:
    hosts: dict[str, tuple[int, ...]] = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,6})", line)
        if match is None:
            raise UserError(f"{path}, line {number}: {line!r} is not of the form NAME slots=N")
        host, slots = match[1], int(match[2])
        if not _HOST.fullmatch(host):
            raise UserError(
                f"{path}, line {number}: {host!r} is not a host name; use letters, digits, '.', '-' and '_'"
            )
        if host in hosts:
            raise UserError(f"{path}, line {number}: {host} is listed twice; give all its slots in one line")
        if slots == 0:
            raise UserError(f"{path}, line {number}: {host} has no slots; give at least 1 or delete the line")
        hosts[host] = tuple(range(slots))
    if not hosts:
        raise UserError(f"{path} lists no host; give lines of the form NAME slots=N")
    return hosts


def _selection(option: str, text: str, hosts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    chosen = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            raise UserError(
                f"{option} {text}: {host or 'an empty name'} is not in the hostfile; choose from {', '.join(hosts)}"
            )
        if colon and not all(number.isdecimal() for number in numbers.split(",")):
            raise UserError(f"{option} {text}: '{part}' is not of the form HOST:SLOT,SLOT")
        slots = tuple(sorted(set(map(int, numbers.split(","))))) if colon else hosts[host]
        if not set(slots) <= set(hosts[host]):
            raise UserError(f"{option} {text}: {host} has only the slots 0 to {len(hosts[host]) - 1}; use those")
        chosen[host] = slots
    return chosen
