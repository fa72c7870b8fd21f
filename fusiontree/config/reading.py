"""Reading of a configuration from YAML files and overrides, with errors of one line."""

import difflib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fusiontree.config.keys import LENGTHS, hint, leaves, short, table_of
from fusiontree.config.run_config import RunConfig
from fusiontree.config.text import load_yaml
from fusiontree.errors import UserError
from fusiontree.paths import expand_home


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load and validate a configuration.

    Args:
        source: a preset's name (`tiny`) or a YAML file's path. A file may extend another: ``base: 1b`` (a preset, or a
            path relative to the file); its own values override the base's, key by key.
        overrides: ``key=value`` with a dotted key and a YAML value; later ones win.

    Raises:
        UserError: the configuration is invalid; the message is one line.
    """
    layers = [
        *_file_layers(expand_home(source), ()),
        *[(_name(text), _parse_override(text)) for text in overrides],
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, tree in layers:
        given = dict(leaves(tree, where))
        for key, value in given.items():
            other = LENGTHS.get(key)
            if other is not None and value is not None:
                _require_one_length(where, key, given)
                values[other] = None  # a later layer's length overrides one in the other unit
            _put(values, key, value)
            origins[key] = where
    _lengths_to_steps(values, origins)
    try:
        # from JSON, because pydantic's strict mode then accepts a string as a path and a mapping as a dataclass
        return RunConfig.model_validate_json(json.dumps(_nested(values)))
    except ValidationError as error:
        command = " ".join([source, *overrides])
        raise UserError(_format_errors(error.errors(), origins, command)) from None


def _lengths_to_steps(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Convert the schedule's lengths in tokens to steps, rounding up."""
    batch = values.get("batch.tokens")
    for name in (name for name in LENGTHS if name.endswith("tokens") and values.get(name) is not None):
        if type(values[name]) is not int:
            raise UserError(f"{origins[name]}: {name} is {short(values[name])}; it must be a number of tokens")
        if type(batch) is int and batch > 0:  # an invalid batch is reported by the validation
            values[LENGTHS[name]], values[name] = -(-values[name] // batch), None
            origins[LENGTHS[name]] = origins[name]
    for name in ("schedule.steps", "schedule.warmup_steps"):
        if name in values and values[name] is None:
            del values[name]


def _require_one_length(where: str, key: str, given: Mapping[str, Any]) -> None:
    other = LENGTHS[key]
    if given.get(other) is not None:
        raise UserError(f"{where}: {key} {given[key]} and {other} {given[other]} are both given; remove one")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value; null in a table removes the entry and everything below it."""
    if value is not None or table_of(key) is None:
        values[key] = value
        return
    for below in [k for k in values if k == key or k.startswith(f"{key}.")]:
        del values[below]


def preset_names() -> list[str]:
    """Return the names of the presets in the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def _presets() -> Traversable:
    return importlib.resources.files("fusiontree") / "presets"


def _file_layers(source: str, seen: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, tree) of `source` and its bases, the root base first; the name is for messages."""
    if source in seen:
        raise UserError(f"{source}: `base` is circular ({' -> '.join([*seen, source])}); remove one of them")
    tree = _parse(_read(source, seen), source)
    base = tree.pop("base", None)
    if base is None:
        return [(source, tree)]
    if not isinstance(base, str):
        raise UserError(f"{source}: base is {base!r}; it must be a preset's name or the path of a YAML file")
    if base not in preset_names():
        base = str(Path(source).parent / expand_home(base))
    return [*_file_layers(base, (*seen, source)), (source, tree)]


def _read(source: str, seen: tuple[str, ...]) -> str:
    if source in preset_names():
        return (_presets() / f"{source}.yaml").read_text(encoding="utf-8")
    needed_by = f"{seen[-1]}: base " if seen else "configuration "
    try:
        return Path(source).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(source, preset_names(), 1)
        hint = f"; did you mean the preset '{near[0]}'?" if near else ""
        presets = ", ".join(preset_names())
        raise UserError(f"{needed_by}{source} is neither a file nor a preset ({presets}){hint}") from None
    except IsADirectoryError:
        raise UserError(f"{needed_by}{source} is a folder; name a YAML file or a preset") from None
    except PermissionError:
        raise UserError(f"{needed_by}{source} cannot be read; change its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{needed_by}{source} is not UTF-8 text; save it as UTF-8") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    tree = load_yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {type(tree).__name__} {short(tree)}; it must consist of `key: value` lines")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{_name(text)} is not of the form key=value, e.g. optimizer.lr=3e-4")
    return {key: load_yaml(value, _name(text))}


def _name(override: str) -> str:
    """Return the name of an override in messages, in at most 200 characters of its text."""
    return f"override '{override if len(override) <= 200 else override[:197] + '...'}'"


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _format_errors(errors: list[ErrorDetails], origins: Mapping[str, str], command: str) -> str:
    """Format the first of pydantic's errors in one line, with the number of the others."""
    error = errors[0]
    key = ".".join(part for part in map(str, error["loc"]) if part)
    where = origins.get(key, command)
    if error["type"] == "missing":
        message = f"{where}: {key} is missing; set it, or extend a preset with `base: tiny`"
    elif error["type"] == "value_error":
        message = f"{where}: {key + ': ' if key else ''}{error['ctx']['error']}"
    elif error["type"] == "extra_forbidden":
        message = f"{where}: unknown key '{key}'; {hint(key)}"
    elif error["type"] == "string_pattern_mismatch":
        message = f"{where}: {key} is {short(error['input'])}; use letters, digits, '_', '-' and, after the first, '.'"
    else:
        message = f"{where}: {key} is {short(error['input'])}; {error['msg'].replace('Input should', 'it must', 1)}"
    more = len(errors) - 1
    return message + (f" ({more} more error{'s' * (more > 1)})" if more else "")
