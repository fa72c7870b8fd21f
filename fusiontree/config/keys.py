"""The dotted keys of a configuration: their names, flattening of a tree to them, and those free to change on resume."""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from fusiontree.config.run_config import RunConfig
from fusiontree.config.sections import Section
from fusiontree.errors import UserError
from fusiontree.files import has_control_characters
from fusiontree.model.config import ModelConfig


def _keys_by_section() -> dict[str, tuple[str, ...]]:
    sections = {}
    for name, info in RunConfig.model_fields.items():
        kind = info.annotation
        if kind is ModelConfig:
            sections[name] = tuple(field.name for field in fields(kind))
        elif kind in Section.__subclasses__():
            sections[name] = tuple(kind.model_fields)
    return sections


SECTIONS = _keys_by_section()
KEYS = tuple(
    f"{name}.{key}" if key else name for name in RunConfig.model_fields for key in SECTIONS.get(name, (None,))
)  # every dotted key, in order of declaration
_LISTS = ("model.layer_kinds", "model.layer_global_heads")  # keys whose value is a list
# tables, whose entries the user names, and the number of names before a value, e.g. 2 for data.sources.NAME.weight
TABLES = {"data.sources": 2, "data.weights": 2, "data.curriculum": 1}
# tables of values by step, interpolated linearly; a single value means step 0
POINTS = ("losses.gate_balance", "losses.gate_entropy", "distill.weight")
TABLES |= dict.fromkeys(POINTS, 1)
SHORT_FORMS = {"activation_checkpointing": "policy"}  # a string in place of the section sets this key
_TABLE_HINTS = {
    "data.sources": "give data.sources.NAME.path and, optionally, weight and max_epochs",
    "data.weights": "give data.weights.STEP.NAME, the weight of source NAME from that step on",
    "data.curriculum": "give data.curriculum.STEP, the tokens per row from that step on",
    **{key: f"give one value, or {key}.STEP, values by step that are interpolated linearly" for key in POINTS},
}

# each length's key in the other unit
LENGTHS = {f"schedule.{name}steps": f"schedule.{name}tokens" for name in ("", "warmup_", "decay_")}
LENGTHS |= {tokens: steps for steps, tokens in LENGTHS.items()}


def leaves(tree: Mapping[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of `tree` with its value.

    Args:
        tree: a configuration or a part of it.
        where: its origin, for messages.
        prefix: the dotted path of `tree`, with a trailing dot.

    Raises:
        UserError: a key is unknown, or a value is not a finite scalar where one is needed.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SHORT_FORMS and isinstance(value, str):
            key = f"{key}.{SHORT_FORMS[key]}"
        table = table_of(key)
        if isinstance(value, dict) and (value or key in SECTIONS):
            yield from leaves(value, where, f"{key}.")
        elif key in POINTS and value is not None:
            yield key, None  # drops the table of an earlier layer
            yield f"{key}.0", _plain(value, key, where)
        elif table is not None and value is not None and key.count(".") != table.count(".") + TABLES[table]:
            raise UserError(f"{where}: {key} is {short(value)}; {_TABLE_HINTS[table]}")
        elif key in SECTIONS:
            raise UserError(f"{where}: '{key}' is a section, not a value; its keys are {', '.join(SECTIONS[key])}")
        elif key not in KEYS and table is None:
            raise UserError(f"{where}: unknown key '{key}'; {suggestion(key)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key} is {value}; it must be finite")
        else:
            yield key, _plain(value, key, where)


def table_of(key: str) -> str | None:
    """Return the table that `key` is or is an entry of, or None."""
    return next((table for table in TABLES if key == table or key.startswith(f"{table}.")), None)


def is_key(key: str) -> bool:
    """Return whether `key` is a valid key, or is in a table."""
    return key in KEYS or table_of(key) is not None


def is_among(key: str, given: Collection[str]) -> bool:
    """Return whether `given` contains `key` or its table."""
    return key in given or table_of(key) in given


def _plain(value: Any, key: str, where: str) -> Any:
    if isinstance(value, str) and has_control_characters(value):
        raise UserError(f"{key} is {short(value)}, which contains a control character; remove it")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: {key} is {short(value)}; it must be below 2^63")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if key in _LISTS and isinstance(value, list):
        return value
    raise UserError(f"{where}: {key} is {short(value)}; it must be a single value")


def suggestion(key: str) -> str:
    """Suggest the valid key nearest to `key`, preferring the same last name: `lr` gives `optimizer.lr`."""
    same_name = [k for k in KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, same_name or [*KEYS, *SECTIONS], 1, 0.0 if same_name else 0.6)
    return f"did you mean '{near[0]}'?" if near else f"top-level keys are {', '.join(RunConfig.model_fields)}"


def hint(key: str) -> str:
    """Return the remedy for the unknown `key`."""
    table = table_of(key)
    return _TABLE_HINTS[table] if table else suggestion(key)


def short(value: Any) -> str:
    """Format `value` for a one-line message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# keys that may change on resume: they affect neither the data nor the mathematics
_FREE_ON_RESUME = re.compile(
    r"name|output|init_from|data\.path|data\.sources\.[^.]+\.path|data\.(workers|max_bad_rows|max_bad_share|cache|cache_gb)"
    r"|deepspeed|nvme_path|batch\.micro_rows"
    r"|(logging|validation|checkpoint|health|kernels|activation_checkpointing)\..+"
)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the dotted keys whose values differ and must not change on resume."""
    before, after = (dict(leaves(config.model_dump(mode="json"), "config")) for config in (old, new))
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    return [key for key in differing if not _FREE_ON_RESUME.fullmatch(key)]
