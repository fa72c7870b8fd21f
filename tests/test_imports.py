"""Who may import whom: every import statement of the project, held to the arrows of the design."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fusiontree", "launcher", "data_tools")
LEAVES = {
    *("fusiontree", "fusiontree.errors", "fusiontree.files", "fusiontree.console", "fusiontree.network"),
    *("fusiontree.incidents", "fusiontree.jsonlines", "fusiontree.lease", "fusiontree.signals", "fusiontree.outcome"),
}

# part of the project → the parts it may import, besides itself and the leaves
ARROWS = {
    "fusiontree.model": set(),
    "fusiontree.config": {"fusiontree.model.config"},
    "fusiontree.flops": {"fusiontree.model.config"},
    "fusiontree.distributed": set(),
    "fusiontree.kernels": {"fusiontree.model"},
    "fusiontree.data": set(),
    "fusiontree.checkpoint": {
        *("fusiontree.distributed", "fusiontree.layout", "fusiontree.resize", "fusiontree.weights"),
    },
    "fusiontree.saver": {"fusiontree.checkpoint", "fusiontree.distributed", "fusiontree.resize"},
    "fusiontree.layout": set(),
    "fusiontree.resize": {"fusiontree.layout"},
    "fusiontree.weights": {"fusiontree.layout"},
    "fusiontree.parity": {"fusiontree.model", "fusiontree.kernels", "fusiontree.weights"},
    "fusiontree.prune": {"fusiontree.model"},
    "fusiontree.prune.pruner": {
        *("fusiontree.prune", "fusiontree.checkpoint", "fusiontree.config", "fusiontree.distributed"),
        *("fusiontree.kernels", "fusiontree.model", "fusiontree.evaluate", "fusiontree.bench.decoding"),
    },
    "fusiontree.training": {
        *("fusiontree.config", "fusiontree.model", "fusiontree.data", "fusiontree.checkpoint"),
        *("fusiontree.saver", "fusiontree.distributed", "fusiontree.kernels", "fusiontree.prune", "fusiontree.flops"),
        *("fusiontree.exported", "fusiontree.weights"),  # readers of exported folders: a teacher, a start
    },
    "fusiontree.export": {
        *("fusiontree.config", "fusiontree.model", "fusiontree.checkpoint", "fusiontree.prune"),
        *("fusiontree.kernels", "fusiontree.parity", "fusiontree.weights", "fusiontree.training.metrics"),
        "fusiontree.exported",  # the reader of an exported folder owns what it looks for there
        "fusiontree.data",  # whose tokenizer goes along
    },
    "fusiontree.exported": {"fusiontree.kernels", "fusiontree.model", "fusiontree.weights"},
    "fusiontree.generate": {"fusiontree.exported", "fusiontree.model"},
    "fusiontree.evaluate": {
        *("fusiontree.exported", "fusiontree.generate", "fusiontree.model", "fusiontree.data"),
        "fusiontree.bench.decoding",  # throughput is measured in one way
    },
    "fusiontree.bench.decoding": {"fusiontree.bench.measure", "fusiontree.generate", "fusiontree.model"},
    "fusiontree.bench.measure": {"fusiontree.distributed", "fusiontree.flops"},
    "fusiontree.bench": {
        *("fusiontree.config", "fusiontree.model", "fusiontree.data", "fusiontree.training", "fusiontree.exported"),
        *("fusiontree.distributed", "fusiontree.kernels", "fusiontree.flops", "fusiontree.prune.plan"),
    },
    "fusiontree.bench.export": {
        *("fusiontree.bench.measure", "fusiontree.checkpoint", "fusiontree.config", "fusiontree.data"),
        *("fusiontree.kernels", "fusiontree.layout", "fusiontree.model", "fusiontree.weights"),
        "fusiontree.training.optimizer",  # whose groups ZeRO cuts up
    },
    "fusiontree.report": {
        *("fusiontree.checkpoint", "fusiontree.model.config", "fusiontree.training.metrics"),
    },
    "fusiontree.memory": {"fusiontree.config", "fusiontree.model.config"},
    "fusiontree.doctor": {
        "fusiontree.memory",
        *("fusiontree.config", "fusiontree.data", "fusiontree.distributed", "fusiontree.kernels", "fusiontree.model"),
    },
    "launcher": {"fusiontree.config", "fusiontree.memory", "fusiontree.training.metrics"},
    "fusiontree.probe": {"fusiontree.distributed"},
    "fusiontree.status": {"fusiontree.config", "fusiontree.training.metrics", "launcher"},
    "data_tools": {"fusiontree.data"},
    "fusiontree.errors": set(),
    "fusiontree.files": set(),
    "fusiontree.console": set(),
    "fusiontree.network": set(),
    "fusiontree.incidents": set(),
    "fusiontree.jsonlines": set(),
    "fusiontree.signals": set(),
    "fusiontree.lease": set(),
    "fusiontree.outcome": set(),
}
FREE = ("fusiontree.cli", "fusiontree.demo", "fusiontree.__main__", "fusiontree")
TORCH = {"torch", "deepspeed", "transformers"}
TORCH_FREE = (
    *("fusiontree.config", "fusiontree.model.config", "fusiontree.data", "launcher", "data_tools"),
    *("fusiontree.training.data", "fusiontree.training.metrics", "fusiontree.training.progress"),
    *("fusiontree.errors", "fusiontree.files", "fusiontree.console", "fusiontree.cli", "fusiontree.__main__"),
    *("fusiontree.flops", "fusiontree.incidents", "fusiontree.lease", "fusiontree.signals", "fusiontree.memory"),
    *("fusiontree.outcome", "fusiontree.status", "fusiontree.jsonlines"),
)


def modules() -> dict[str, Path]:
    """Every first-party module by its dotted name."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `tree` imports, at any depth; ``from p import m`` counts as p.m where that is a module."""
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
    """The part of ARROWS that `module` belongs to, the most specific one; None for a free one."""
    if module in FREE or within(module, "fusiontree.cli"):
        return None
    parts = [part for part in ARROWS if within(module, part)]
    assert parts, f"{module} stands in no part of ARROWS: say there what it may import"
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
        "import a.b\nfrom . import ops\ndef f():\n    from ..config import X\n    from fusiontree import cli"
    )
    assert imports(tree, "fusiontree.model.lm") == {
        *("a.b", "fusiontree.model.ops", "fusiontree.config", "fusiontree.cli")
    }
    assert imports(ast.parse("from .config import X"), "fusiontree.model", True) == {"fusiontree.model.config"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fusiontree.model.lm", "fusiontree.errors"),
        ("fusiontree.config", "fusiontree.model.lm"),
        ("fusiontree.data.stream", "fusiontree.config"),
        ("launcher.plan", "fusiontree.training.engine"),
        ("data_tools.build", "fusiontree.config"),
        ("fusiontree.training.engine", "fusiontree.cli"),
        ("fusiontree.demo", "fusiontree.cli"),
        ("fusiontree.checkpoint", "fusiontree.model.lm"),
    ],
)
def test_these_arrows_would_be_refused(module, name):
    assert forbidden_first_party(module, {name}) == {name}


@pytest.mark.parametrize("module", MODULES)
def test_first_party_imports_follow_the_arrows(module):
    assert forbidden_first_party(module, imports_of(module)) == set()


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
    assert "transformers" not in names or module in ("fusiontree.model.hf", "fusiontree.export", "fusiontree.parity")


@pytest.mark.parametrize("module", [n for n in MODULES if any(within(n, part) for part in TORCH_FREE)])
def test_torch_free_modules_import_no_torch(module):
    assert not {name.split(".")[0] for name in imports_of(module)} & TORCH


@pytest.mark.parametrize("module", [n for n in MODULES if any(within(n, part) for part in TORCH_FREE)])
def test_torch_free_modules_load_no_torch_through_others(module):
    code = f"import sys, {module}; print(sorted({TORCH} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
