"""Every import statement of the project follows the order of the packages in CONTRIBUTING.md."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fusiontree", "launcher", "data_tools")
LEAVES = {
    *("fusiontree", "fusiontree.errors", "fusiontree.files", "fusiontree.console", "fusiontree.cli.stdout"),
    *("fusiontree.distributed.signals", "fusiontree.distributed.outcome", "fusiontree.distributed.ports"),
    "fusiontree.distributed.environment",
    *("fusiontree.run.folder", "fusiontree.run.incidents", "fusiontree.run.jsonlines", "fusiontree.run.lease"),
    *("fusiontree.run.records", "fusiontree.paths", "fusiontree.run.state_files"),
}

# part of the project → the parts it may import, in addition to itself and the leaves, which are all above it
ARROWS = {
    **{leaf: set() for leaf in sorted(LEAVES - {"fusiontree"})},
    "fusiontree.model": set(),
    "fusiontree.kernels": {"fusiontree.model"},
    "fusiontree.zero": set(),
    "fusiontree.config": {"fusiontree.model.config", "fusiontree.zero.settings"},
    "fusiontree.device": set(),
    "fusiontree.distributed": {"fusiontree.device", "fusiontree.zero"},
    "fusiontree.data": set(),
    "fusiontree.run": {"fusiontree.config", "fusiontree.data"},
    "fusiontree.checkpoint": {
        *("fusiontree.data.batch", "fusiontree.distributed", "fusiontree.model.config", "fusiontree.zero"),
    },
    "fusiontree.inference": {
        *("fusiontree.checkpoint.tensor_files", "fusiontree.data.tokenizer", "fusiontree.device"),
        *("fusiontree.kernels", "fusiontree.model"),
    },
    "fusiontree.evaluate": {
        *("fusiontree.data", "fusiontree.distributed", "fusiontree.inference", "fusiontree.model"),
    },
    "fusiontree.prune": {"fusiontree.model"},
    "fusiontree.prune.pruner": {
        *("fusiontree.checkpoint", "fusiontree.config", "fusiontree.data", "fusiontree.device"),
        *("fusiontree.evaluate", "fusiontree.inference", "fusiontree.kernels", "fusiontree.model"),
        "fusiontree.prune",
    },
    "fusiontree.export": {
        *("fusiontree.checkpoint", "fusiontree.config", "fusiontree.data", "fusiontree.inference"),
        *("fusiontree.kernels", "fusiontree.model", "fusiontree.prune"),
    },
    "fusiontree.report": {"fusiontree.checkpoint", "fusiontree.model.config"},
    "fusiontree.doctor": {
        *("fusiontree.config", "fusiontree.device", "fusiontree.distributed", "fusiontree.kernels"),
        *("fusiontree.model", "fusiontree.run.datasets"),
    },
    "fusiontree.doctor.memory": {"fusiontree.config", "fusiontree.model.config"},
    "fusiontree.training": {
        *("fusiontree.checkpoint", "fusiontree.config", "fusiontree.data", "fusiontree.device"),
        *("fusiontree.distributed", "fusiontree.evaluate", "fusiontree.inference", "fusiontree.kernels"),
        *("fusiontree.model", "fusiontree.run", "fusiontree.zero"),
    },
    "fusiontree.bench": {
        *("fusiontree.checkpoint", "fusiontree.config", "fusiontree.data", "fusiontree.device"),
        *("fusiontree.distributed", "fusiontree.inference", "fusiontree.kernels", "fusiontree.model"),
        *("fusiontree.prune", "fusiontree.run.datasets", "fusiontree.training", "fusiontree.zero"),
    },
    "launcher": {"fusiontree.config", "fusiontree.doctor.memory", "fusiontree.run"},
    "data_tools": {"fusiontree.data"},
}
FREE = ("fusiontree.cli", "fusiontree.__main__", "fusiontree")
TORCH = {"torch", "deepspeed", "transformers"}
TORCH_FREE = (
    *("fusiontree.config", "fusiontree.model.config", "fusiontree.model.flops", "fusiontree.data"),
    *("fusiontree.run", "fusiontree.errors", "fusiontree.files", "fusiontree.console", "fusiontree.paths"),
    *("fusiontree.run.state_files", "fusiontree.cli.stdout"),
    *("fusiontree.distributed.signals", "fusiontree.distributed.outcome", "fusiontree.distributed.ports"),
    "fusiontree.distributed.environment",
    *("fusiontree.evaluate.options", "fusiontree.export.options"),
    *("fusiontree.training.metrics", "fusiontree.training.progress", "fusiontree.doctor.memory"),
    *("fusiontree.cli", "fusiontree.__main__", "launcher", "data_tools"),
)


def modules() -> dict[str, Path]:
    """Return the path of every first-party module by its dotted name."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Return the dotted names that `tree` imports, at any depth; ``from p import m`` gives p.m if that is a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            names |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return names


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(ast.parse(path.read_text()), module, path.name == "__init__.py")


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def owner(module: str) -> str | None:
    """Return the most specific part of ARROWS that contains `module`, or None for a part that may import everything."""
    if module in FREE or within(module, "fusiontree.cli"):
        return None
    parts = [part for part in ARROWS if within(module, part)]
    assert parts, f"{module} is in no part of ARROWS; add the parts that it may import"
    return max(parts, key=len)


def forbidden_first_party(module: str, names: set[str]) -> set[str]:
    own = {name for name in names if name.split(".")[0] in PACKAGES}
    part = owner(module)
    if part is None:
        inside = module == "fusiontree.__main__" or within(module, "fusiontree.cli")
        return {name for name in own if within(name, "fusiontree.cli") and not inside}
    if part == "fusiontree.model":
        return {name for name in own if not within(name, part)}
    return {name for name in own - LEAVES if not any(within(name, allowed) for allowed in {part, *ARROWS[part]})}


def test_relative_and_absolute_imports_are_both_seen():
    tree = ast.parse(
        "import a.b\nfrom . import cache\ndef f():\n    from ..config import X\n    from fusiontree import cli"
    )
    assert imports(tree, "fusiontree.model.lm") == {
        *("a.b", "fusiontree.model.cache", "fusiontree.config", "fusiontree.cli")
    }
    assert imports(ast.parse("from .config import X"), "fusiontree.model", True) == {"fusiontree.model.config"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fusiontree.model.lm", "fusiontree.errors"),
        ("fusiontree.config", "fusiontree.model.lm"),
        ("fusiontree.data.stream", "fusiontree.config"),
        ("launcher.job", "fusiontree.training.trainer"),
        ("data_tools.build", "fusiontree.config"),
        ("fusiontree.training.trainer", "fusiontree.cli"),
        ("fusiontree.report", "fusiontree.cli"),
        ("fusiontree.checkpoint.store", "fusiontree.model.lm"),
        ("fusiontree.prune.pruner", "fusiontree.bench.decode"),
        ("fusiontree.zero.engine", "fusiontree.checkpoint.store"),
    ],
)
def test_forbidden_imports_are_detected(module, name):
    assert forbidden_first_party(module, {name}) == {name}


@pytest.mark.parametrize("module", MODULES)
def test_first_party_imports_follow_the_arrows(module):
    assert forbidden_first_party(module, imports_of(module)) == set()


def test_arrows_point_upwards_in_the_table():
    parts = list(ARROWS)
    later = {
        part: {to for to in allowed if owner(to) != part and parts.index(str(owner(to))) > parts.index(part)}
        for part, allowed in ARROWS.items()
    }
    assert not any(later.values()), {part: to for part, to in later.items() if to}


@pytest.mark.slow
@pytest.mark.parametrize("module", [name for name in MODULES if within(name, "fusiontree.model")])
def test_the_model_imports_torch_and_its_siblings_only(module):
    allowed = {*sys.stdlib_module_names, "torch", "fusiontree"}
    if module == "fusiontree.model.hf":
        allowed.add("transformers")
    if module.startswith("fusiontree.model.triton_"):
        allowed.add("triton")
    assert {name.split(".")[0] for name in imports_of(module)} <= allowed


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, "fusiontree.model")])
def test_the_models_imports_of_siblings_are_relative(module):
    """Absolute ones would break in an exported folder."""
    absolute = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Import)]
    absolute_from = [
        node
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0
    ]
    assert not [n for n in absolute if any(a.name.startswith("fusiontree") for a in n.names)]
    assert not [n for n in absolute_from if (n.module or "").startswith("fusiontree")]


@pytest.mark.parametrize("module", MODULES)
def test_only_the_hugging_face_wrapper_and_the_export_that_proves_it_import_transformers(module):
    names = {name.split(".")[0] for name in imports_of(module)}
    assert "transformers" not in names or module in (
        "fusiontree.model.hf",
        "fusiontree.export.exporter",
        "fusiontree.export.parity",
        "fusiontree.export.tokenizer",
    )


@pytest.mark.parametrize("module", [n for n in MODULES if any(within(n, part) for part in TORCH_FREE)])
def test_torch_free_modules_import_no_torch(module):
    assert not {name.split(".")[0] for name in imports_of(module)} & TORCH


# Imports each module of its standard input in a fork, which is ten times as fast as an interpreter for each.
IMPORTER = f"""
import importlib, os, sys, traceback
import numpy, pydantic, yaml
for line in sys.stdin:
    if not os.fork():
        try:
            importlib.import_module(line.strip())
            answer = str(sorted({TORCH} & set(sys.modules)))
        except BaseException:
            answer = repr(traceback.format_exc())
        print(answer, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def importer() -> Iterator[Callable[[str], str]]:
    """Import a module in a fresh process and return which packages of `TORCH` that loaded, as a line."""
    command = [sys.executable, "-c", IMPORTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def load(module: str) -> str:
            process.stdin.write(f"{module}\n")
            process.stdin.flush()
            return process.stdout.readline()

        yield load
        process.stdin.close()


@pytest.mark.parametrize("module", [n for n in MODULES if any(within(n, part) for part in TORCH_FREE)])
def test_torch_free_modules_load_no_torch_through_others(module, importer):
    assert importer(module) == "[]\n"
