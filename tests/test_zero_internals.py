"""DeepSpeed's undocumented attributes: each is checked when an engine is built, and the lists match the code."""

import ast
import collections
import contextlib
import importlib.metadata
import json
import pickle
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MICRO, has_async_io, python

from fusiontree.errors import UserError
from fusiontree.zero import internals
from fusiontree.zero.engine import Slot

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "fusiontree" / "zero").glob("*.py"))
LISTS = {name: value for name, value in vars(internals).items() if isinstance(value, tuple)}
LISTED = {name for names in LISTS.values() for name in names}

# documented by DeepSpeed, or of a torch optimizer, whose interface the engine's optimizer has
DOCUMENTED = {
    *(
        "Init",
        "device",
        "init_distributed",
        "initialize",
        "module",
        "optimizer",
        "param_groups",
        "save_checkpoint",
        "state",
        "zero",
    ),
    *("is_compatible", "zero_grad", "zero_optimization_stage"),
}
# types and modules whose attributes are not DeepSpeed's
TYPES = (torch, torch.Tensor, torch.UntypedStorage, torch.nn, torch.nn.Module, torch.serialization, torch.cuda)
TYPES += (
    torch.distributed,
    set,
    importlib,
    dict,
    list,
    str,
    type,
    collections.Counter,
    Path,
    Slot,
    contextlib,
    pickle,
    re,
)
PROGRAM = """
import json, sys
from fusiontree.config import load_config
from fusiontree.distributed import collectives
from fusiontree.errors import UserError
from fusiontree.training.step import TrainingStep
from fusiontree.zero.internals import _used_attributes, check_engine

world, lines = collectives.start(), {}
for stage in sys.argv[1].split(","):
    engine = TrainingStep(load_config("tiny", [f"deepspeed={stage}", "batch.tokens=256", *sys.argv[2:]]), world).engine
    for owner, names in list(_used_attributes(engine)):
        for name in names:
            holders = [holder for holder in (owner, *type(owner).__mro__) if name in vars(holder)]
            kept = [vars(holder)[name] for holder in holders]  # an instance's method may replace that of its class
            for holder in holders:
                delattr(holder, name)
            try:
                check_engine(engine)
                line = "not noticed"
            except UserError as error:
                line = str(error)
            for holder, value in zip(holders, kept, strict=True):
                setattr(holder, name, value)
            lines[f"{stage} {type(owner).__name__}.{name}"] = line
    check_engine(engine)
    engine.destroy()
collectives.leave()
print(json.dumps(lines))
"""
USED = {  # by ZeRO stage
    "zero0": {*internals.ENGINE},
    "zero1": {*internals.ENGINE, *internals.OPTIMIZER_STAGE_1_2, *internals.PARAMETER_STAGE_1_2},
    "zero3": {*internals.ENGINE, *internals.OPTIMIZER_STAGE_3, *internals.PARAMETER_OFFLOAD},
}
USED["zero1"] |= {*internals.FRAGMENT, *internals.ADDRESS}
USED["zero2"] = USED["zero1"]
USED["zero3"] |= {*internals.PARAMETER_STAGE_3}
USED["zero3_nvme"] = USED["zero3"] | {*internals.OPTIMIZER_NVME}


@pytest.mark.slow
def test_an_engine_that_lacks_an_attribute_is_refused_in_one_line(tmp_path: Path) -> None:
    stages = [stage for stage in USED if "nvme" not in stage or has_async_io()]
    shape = [f"{key}={value}" for key, value in MICRO.items() if key != "batch.tokens"]
    done = python("-c", PROGRAM, ",".join(stages), *shape, f"nvme_path={tmp_path}")
    lines = json.loads(done.stdout.strip().splitlines()[-1])
    version = importlib.metadata.version("deepspeed")
    for stage in stages:
        found = {key.split()[1]: line for key, line in lines.items() if key.split()[0] == stage}
        assert {where.rpartition(".")[2] for where in found} == USED[stage]
        for where, line in found.items():
            wanted = f"DeepSpeed {version} has no {where}, which FusionTree uses; install '{internals.SUPPORTED}'"
            assert line == wanted, stage


def test_a_module_that_lacks_an_attribute_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no deepspeed\.ops\.__compatible_ops__, which FusionTree uses; install"):
        internals.require(SimpleNamespace(__name__="deepspeed.ops"), internals.OPS)


def test_the_supported_range_is_the_required_one() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert internals.SUPPORTED in requirements


def attributes(path: Path) -> set[str]:
    """Return the names of all attributes that a file accesses, by dot or by getattr and hasattr."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return found


def defined(path: Path) -> set[str]:
    """Return the names that a file defines: functions, classes, fields, constants, attributes set on `self`."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


@pytest.mark.slow
def test_every_attribute_of_deepspeed_that_is_used_is_listed() -> None:
    # settings.py has no engine: it reads settings through the standard library and pydantic
    used = set().union(*(attributes(path) for path in FILES if path.stem != "settings"))
    ours = set().union(*map(defined, FILES))
    known = {name for kind in TYPES for name in dir(kind)} | ours | DOCUMENTED
    assert used - known - LISTED == set()


def test_every_attribute_that_is_listed_is_used() -> None:
    others = [path for path in FILES if path.stem != "internals"]
    assert LISTED - set().union(*map(attributes, others)) == set()


@pytest.mark.slow
def test_only_the_package_zero_imports_deepspeed() -> None:
    for package in ("fusiontree", "launcher", "data_tools"):
        for path in (path for path in (ROOT / package).rglob("*.py") if path not in FILES):
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not [name for name in names if name.split(".")[0] == "deepspeed"], path


@pytest.mark.slow
def test_no_attribute_that_is_listed_is_used_elsewhere() -> None:
    private = LISTED - {"numel", "optimizer", "partition", "start"}  # common words with other meanings elsewhere
    for package in ("fusiontree", "launcher", "data_tools"):
        for path in (path for path in (ROOT / package).rglob("*.py") if path not in FILES):
            assert attributes(path) & private == set(), path


def test_every_class_that_is_named_exists() -> None:
    for path in (internals.MUON, internals.ASYNC_IO, *internals.PICKLED):
        assert internals.require_class(path).__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize("path", ["deepspeed.runtime.zero.muon.Renamed", "deepspeed.no_such_module.Muon"])
def test_a_class_that_is_missing_is_named_in_one_line(path: str) -> None:
    with pytest.raises(UserError, match=rf"^DeepSpeed \S+ has no {re.escape(path)}, which FusionTree uses; install '"):
        internals.require_class(path)
