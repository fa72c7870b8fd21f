"""DeepSpeed's JSON settings: their check by the installed DeepSpeed itself, and the rule for `BlockGather`.

DeepSpeed ignores unknown top-level keys, and keys of sections without a pydantic model. `find_problem` lets it read the
settings from mappings that record every key it asks for, so that the valid keys are those of the installed release.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, KeysView, Mapping
from typing import Any, NamedTuple, get_args

from fusiontree.errors import UserError, short_cause

OFFLOADED = ("offload_param", "offload_optimizer")  # sections of zero_optimization
# batch sizes, which the run's configuration owns and DeepSpeed requires
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Problem(NamedTuple):
    """What DeepSpeed does not accept: a key that it does not know, or a value that it refuses."""

    message: str  # one line
    key: str | None = None  # dotted, if it is unknown
    known: tuple[str, ...] = ()  # the valid keys in its place


def find_problem(settings: Mapping[str, Any]) -> Problem | None:
    """Check every key and value of `settings` (the content of a DeepSpeed JSON) with the installed DeepSpeed.

    This starts a process, because the import of DeepSpeed takes seconds, prints to standard output and selects an
    accelerator.

    Raises:
        UserError: DeepSpeed cannot be imported.
    """
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", "from fusiontree.zero.settings import main; main()"],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
    )
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise UserError(f"DeepSpeed cannot be imported ({cause}); reinstall it")
    found = json.loads(done.stdout.splitlines()[-1])
    return Problem(found[0], found[1], tuple(found[2])) if found else None


def main() -> None:
    """Print the problem of the settings on standard input, as JSON on the last line of standard output."""
    problem = examine(json.load(sys.stdin))
    print()
    print(json.dumps(problem))


def examine(settings: dict[str, Any]) -> Problem | None:
    """Return the first problem that DeepSpeed has with `settings`; see `find_problem`. This imports DeepSpeed."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    top = _Recording({**_BATCH, **settings})
    for key, value in settings.items():
        if isinstance(value, dict):
            top[key] = _Recording(value)
    refused: Problem | None = None
    try:
        DeepSpeedConfig(top)
    except ValidationError as error:
        refused = _describe(error, settings)
    except Exception as error:  # AssertionError, ValueError, DeepSpeedConfigError and whatever a wrong type leads to
        refused = Problem(f"DeepSpeed refuses it ({_first_sentence(error)}); correct it")
    # DeepSpeed stops at the first value that it refuses, and then has not read all keys
    known = top if refused is None else _Recording(_BATCH)
    if refused is not None:
        DeepSpeedConfig(known)
    for key in settings:
        if key not in known.read:
            return _unknown(key, known.read)
    return refused or _wrong_type(top) or _unread(top)


class _Recording(dict[str, Any]):
    """A dict that records the keys that are looked up in it, with their default values."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.read.setdefault(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.setdefault(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)  # `in` looks up in the dict

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without this method, `f(**section)` copies the dict and looks nothing up


def _wrong_type(top: _Recording) -> Problem | None:
    """Return the first top-level value of another type than its default, which DeepSpeed does not check."""
    for key, value in top.items():
        default = top.read[key]
        if isinstance(default, bool) and not isinstance(value, bool):
            return Problem(f"{key} is {_short(value)}; it must be true or false")
        if type(default) in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            return Problem(f"{key} is {_short(value)}; it must be a number")
    return None


def _unread(top: _Recording) -> Problem | None:
    """Return the first key of a section that DeepSpeed has not looked up, if it has looked up others."""
    for name, section in top.items():
        for key in section if isinstance(section, _Recording) and section.read else ():
            if key not in section.read:
                return _unknown(f"{name}.{key}", [f"{name}.{valid}" for valid in section.read])
    return None


def _describe(error: Any, settings: Mapping[str, Any]) -> Problem:
    """Return the first of pydantic's errors: the key with its section, and the valid names in the place of it."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if not path:  # a check across the keys of a section
        return Problem(f"DeepSpeed refuses it ({first['msg'].removeprefix('Value error, ')}); correct it")
    sections = [name for name, value in settings.items() if isinstance(value, dict) and path[0] in value]
    key = ".".join([*sections[:1], *path])
    if first["type"] == "extra_forbidden":
        prefix = key.rpartition(".")[0]
        return _unknown(key, [f"{prefix}.{name}" for name in _field_names(error.title, path[:-1])])
    return Problem(f"{key} is {_short(first['input'])}; {first['msg'].replace('Input should', 'it must', 1)}")


def _field_names(model: str, path: Iterable[str]) -> list[str]:
    """Return the names of the fields of DeepSpeed's model `model`, or of the model at `path` inside it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    found: Any = next((kind for kind in _subclasses(DeepSpeedConfigModel) if kind.__name__ == model), None)
    for name in path:
        field = getattr(found, "model_fields", {}).get(name)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        found = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(found, "model_fields", {}))


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _unknown(key: str, known: Iterable[str]) -> Problem:
    return Problem(f"DeepSpeed has no key '{key}'", key, tuple(sorted(known)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _first_sentence(error: Exception) -> str:
    return short_cause(ValueError(str(error).split(". ")[0])) if str(error) else type(error).__name__


def offloads(zero: Mapping[str, Any]) -> bool:
    """Return whether the settings `zero` (``zero_optimization``) move weights or optimizer states off the device."""
    return any(part in zero for part in OFFLOADED)


def gathers_blocks(zero: Mapping[str, Any]) -> bool:
    """Return whether `block_gather.BlockGather` serves an engine with the settings `zero` (``zero_optimization``)."""
    return zero.get("stage", 0) == 3 and not offloads(zero)
