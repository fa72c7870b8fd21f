"""The configuration as YAML, with YAML 1.2's scalars (PyYAML implements 1.1)."""

import re
from typing import Any

import yaml

from fusiontree.config.run_config import RunConfig
from fusiontree.errors import UserError, short_cause


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: the YAML.
        where: its origin, for messages.

    Raises:
        UserError: `text` is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # e.g. a number of 5,000 digits, a list as a key
        raise UserError(f"{where}: not valid YAML: {short_cause(error)}") from None


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.2's scalars (``1e-4`` is a number, ``no`` a string) that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes every string which YAML 1.1 or 1.2 would read as another type."""


_Loader.yaml_implicit_resolvers = {}  # replaces YAML 1.1's
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
for _tag, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
