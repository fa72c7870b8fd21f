"""The dotted keys of a configuration: which there are, how a tree comes down to them, which may change on a resume."""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from fusiontree.config.run import RunConfig
from fusiontree.config.sections import Section
from fusiontree.errors import UserError
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
)  # every dotted key, in order
_LISTS = ("model.layer_kinds", "model.layer_global_heads")  # keys whose value is a list
# keys below which the user chooses names, and how many names lead to a value: data.sources.NAME.weight, ...
TABLES = {"data.sources": 2, "data.weights": 2, "data.curriculum": 1}
# tables of values by step, joined by straight lines; a single value holds from step 0 on
POINTS = ("losses.gate_balance", "losses.gate_entropy", "distill.weight")
TABLES |= dict.fromkeys(POINTS, 1)
SHORT_FORMS = {"activation_checkpointing": "policy"}  # a single value given to the section is that of this key
_TABLE_HINTS = {
    "data.sources": "give data.sources.NAME.path and, if you like, weight and max_epochs",
    "data.weights": "give data.weights.STEP.NAME: the weight of source NAME from that step on",
    "data.curriculum": "give data.curriculum.STEP: the tokens per row from that step on",
    **{key: f"give one value, or {key}.STEP: values by step, joined by straight lines" for key in POINTS},
}

# a length's key in the other unit
LENGTHS = {f"schedule.{name}steps": f"schedule.{name}tokens" for name in ("", "warmup_", "decay_")}
LENGTHS |= {tokens: steps for steps, tokens in LENGTHS.items()}


def leaves(tree: Mapping[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of `tree` and their values; each key must be one of KEYS."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SHORT_FORMS and isinstance(value, str):
            key = f"{key}.{SHORT_FORMS[key]}"
        table = table_of(key)
        if isinstance(value, dict) and (value or key in SECTIONS):
            yield from leaves(value, where, f"{key}.")
        elif key in POINTS and value is not None:
            yield key, None  # in place of whatever was there
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
    """The one of TABLES that `key` is or lies in."""
    return next((table for table in TABLES if key == table or key.startswith(f"{table}.")), None)


def is_key(key: str) -> bool:
    """Whether there is a `key`, be it an entry of a table."""
    return key in KEYS or table_of(key) is not None


def is_among(key: str, given: Collection[str]) -> bool:
    """Whether `key` is one of `given`, or an entry of a table that is."""
    return key in given or table_of(key) in given


def _plain(value: Any, key: str, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if key in _LISTS and isinstance(value, list):
        return value
    raise UserError(f"{where}: {key} is {short(value)}; it must be a single value")


def suggestion(key: str) -> str:
    """The valid key nearest to `key`; one with the same last name wins, so that `lr` finds `optimizer.lr`."""
    same_name = [k for k in KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, same_name or [*KEYS, *SECTIONS], 1, 0.0 if same_name else 0.6)
    return f"did you mean '{near[0]}'?" if near else f"top-level keys are {', '.join(RunConfig.model_fields)}"


def hint(key: str) -> str:
    """What to give in place of the unknown `key`."""
    table = table_of(key)
    return _TABLE_HINTS[table] if table else suggestion(key)


def short(value: Any) -> str:
    """`value` for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# what may change when a run is resumed: it moves neither the data nor the mathematics
_FREE_ON_RESUME = re.compile(
    r"name|output|init_from|data\.path|data\.sources\.[^.]+\.path|data\.(workers|max_bad_rows|cache|cache_gb)"
    r"|deepspeed|nvme_path|batch\.micro_rows"
    r"|(logging|validation|checkpoint|health|kernels|activation_checkpointing)\..+"
)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ and must not when a run is resumed."""
    before, after = (dict(leaves(config.model_dump(mode="json"), "config")) for config in (old, new))
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    return [key for key in differing if not _FREE_ON_RESUME.fullmatch(key)]
