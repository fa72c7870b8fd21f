"""An exported folder runs in an OpenAI-compatible server and in a public evaluation harness."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import export_small

from fusiontree.distributed.ports import free_port

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def missing(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tmp_path_factory.mktemp("runs"), tokenizer_folder)


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """Run `transformers serve` with the model and yield its address once it answers."""
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--trust-remote-code"]
    with open(log, "w") as stream:
        words = [*map(str, command), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=OFFLINE, cwd=log.parent)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(
    missing("fastapi", "uvicorn", "openai", "accelerate"),
    reason="needs pip install 'transformers[serving]' accelerate",
)
def test_transformers_serve_streams_a_completion(exported: Path, tmp_path: Path) -> None:
    body = {"model": str(exported), "prompt": "tree gate", "max_tokens": 8, "stream": True}
    with serving(exported, tmp_path / "log") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            lines = [line.decode().strip() for line in answer if line.strip()]
    assert all(line.startswith("data: ") for line in lines), lines
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    assert len(chunks) > 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])


TASK = """
task: trees
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(missing("lm_eval", "accelerate"), reason="needs pip install 'fusiontree[harness]'")
def test_the_evaluation_harness_runs_a_local_task(exported: Path, tmp_path: Path) -> None:
    data = tmp_path / "trees.jsonl"
    rows = [{"question": f"tree {i} gate", "choices": [" branch", " scan"], "answer": i % 2} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "trees.yaml").write_text(TASK.format(data=data))
    options = ["--model", "hf", "--model_args", f"pretrained={exported},trust_remote_code=True", "--device", "cpu"]
    where = ["--include_path", tmp_path, "--tasks", "trees", "--output_path", tmp_path / "out", "--batch_size", 2]
    environment = OFFLINE | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lm_eval", "run", *map(str, [*options, *where])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["trees"]["acc,none"] <= 1
