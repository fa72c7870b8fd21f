"""Messages give the cause of a library's or the system's error in a few words, never the objects inside it."""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pydantic
import pytest
from test_imports import MODULES, within

from fusiontree.checkpoint import store, tensor_files
from fusiontree.config import deepspeed_json, load_config
from fusiontree.data.format import Manifest, read_index, tokenizer_fingerprint
from fusiontree.errors import RunError, UserError, short_cause, typed_cause
from fusiontree.inference import loading
from fusiontree.prune.plan import read_plan


class _Shape(pydantic.BaseModel):
    stage: int


def cause_of(action: Callable[[], object]) -> str:
    """Return the short cause of the exception that `action` raises."""
    try:
        action()
    except Exception as error:
        return short_cause(error)
    raise AssertionError("no exception")


HEADER = b"\x93NUMPY" + bytes(5000) + b"\xff"


@pytest.mark.parametrize(
    ("action", "cause"),
    [
        (lambda: Path("/").read_text(), "Is a directory"),
        (lambda: HEADER.decode(), "byte 0 is not UTF-8 text"),
        (lambda: "ab\ud800".encode(), "character 2 is not valid Unicode"),
        (lambda: json.loads('{"a":\n 1'), "Expecting ',' delimiter at line 2, column 3"),
        (lambda: {}["sha256"], "no entry 'sha256'"),
        (lambda: [].items(), "unexpected structure"),
        (lambda: {**[]}, "unexpected structure"),  # type: ignore[dict-item]
        (lambda: [][3], "unexpected structure"),
        (lambda: int("x" * 5000), "invalid literal for int() with base 10: '" + "x" * 100),
        (lambda: _Shape.model_validate({"stage": "a"}), "stage: Input should be a valid integer, unable to parse"),
    ],
)
def test_a_cause_is_short_and_quotes_no_content(action, cause):
    short = cause_of(action)
    assert short.startswith(cause)
    assert len(short) <= 200
    assert short.isprintable()


def test_a_librarys_error_keeps_its_type():
    assert typed_cause(RuntimeError("libcuda.so \x1b[31mis\nmissing")) == "RuntimeError: libcuda.so \\x1b[31mis missing"
    assert typed_cause(ValueError()) == "ValueError"
    assert typed_cause(ConnectionResetError("Connection lost")) == "ConnectionResetError: Connection lost"
    assert short_cause(UserError("ours, with its remedy")) == "ours, with its remedy"
    assert short_cause(RunError("ours")) == "ours"


READERS = {
    "manifest.json": lambda path: Manifest.load(path.parent),
    "tokenizer.json": lambda path: tokenizer_fingerprint(path.parent),
    "fusiontree.json": lambda path: loading.read_facts(path.parent),
    "config.json": lambda path: loading.read_config(path.parent),
    "state.json": lambda path: store.read_state(path.parent),
    "model.safetensors.index.json": lambda path: tensor_files.from_safetensors(path.parent),
    "model.safetensors": lambda path: tensor_files.from_safetensors(path.parent),
    "plan.json": lambda path: read_plan(path, load_config("tiny").model),
    "zero.json": lambda path: deepspeed_json(load_config("tiny", [f"deepspeed={path}"])),
    "run.yaml": lambda path: load_config(str(path)),
    "000000.idx": lambda path: read_index(path.with_suffix(".tar")),
}


@pytest.mark.parametrize("content", [HEADER, b"[1, 2", b"[]", b"{}", b"null", b"7"])
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_other_content_is_one_short_line(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        READERS[name](path)
    except (UserError, RunError) as error:
        message = str(error).replace(str(tmp_path), "")
    else:
        assert name in ("tokenizer.json", "zero.json")  # a fingerprint needs JSON only; {} is no ZeRO
        json.loads(content)
        return
    assert len(message) < 260
    assert message.isprintable()
    assert not [word for word in ("Errno", "Error(", "b'", "' object", "NoneType", "__init__") if word in message]


OURS = {"UserError", "RunError", "StoppedError", "HungError", "Rejected", "UnreachableError", "AccessDeniedError"}


def quoted_errors(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that put a caught exception other than the project's own into an f-string, `str` or `repr`."""
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name):
        caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
        if caught <= OURS:
            continue
        shown = [node.value for node in ast.walk(handler) if isinstance(node, ast.FormattedValue)]
        calls = [node for value in shown for node in ast.walk(value) if isinstance(node, ast.Call) and node.args]
        shown += [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("str", "repr")]
        for value in shown:
            if isinstance(value, ast.Attribute) and value.attr == "strerror":
                value = value.value
            if isinstance(value, ast.Name) and value.id == handler.name:
                yield value.lineno


def test_the_guard_sees_a_quoted_error():
    source = 'try: pass\nexcept OSError as error:\n raise RunError(f"{%s}")'
    for form in ("error", "error!r", "error.strerror", "' '.join(str(error).split())"):
        assert list(quoted_errors(ast.parse(source % form))) == [3]
    assert not list(quoted_errors(ast.parse(source % "short_cause(error)")))


# the model is exported without `fusiontree.errors`, and raises ValueError with messages of its own
@pytest.mark.parametrize("module", [name for name in MODULES if not within(name, "fusiontree.model")])
def test_no_message_quotes_a_foreign_error(module):
    assert list(quoted_errors(ast.parse(MODULES[module].read_text()))) == []
