"""Benchmark of export: peak memory and time of exporting a checkpoint with random weights."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontree.checkpoint import store
from fusiontree.checkpoint.tensor_files import StoredTensor, locate_weights
from fusiontree.config import RunConfig, deepspeed_json, load_config, to_yaml
from fusiontree.console import progress_bar
from fusiontree.data.format import tokenizer_fingerprint
from fusiontree.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE
from fusiontree.device import describe_machine
from fusiontree.errors import RunError, UserError
from fusiontree.files import refuse_below_file
from fusiontree.kernels import DTYPES
from fusiontree.model.lm import HybridLM, materialize, seeded_init
from fusiontree.run.folder import CONFIG_FILE, GATES_FILE, STATE_FILE, TOKENIZER, checkpoint_path
from fusiontree.training.optimizer import parameter_groups
from fusiontree.zero import layout

MARGIN = 2**28  # bytes of disk needed in addition to the weights
POLL = 0.02  # seconds between two readings of the process's memory


def bench_export(
    preset: str, overrides: list[str], dtype: str = "fp32", ranks: int = 8, folder: Path | None = None
) -> dict[str, Any]:
    """Write a checkpoint of `preset` with initial weights and export it by ``fusiontree export`` in a child process.

    Args:
        preset: its name or a YAML file.
        overrides: ``key=value``, as for a run; `deepspeed` sets the ZeRO stage.
        dtype: `fp32` or `bf16`, of the exported weights.
        ranks: number of ranks that the checkpoint is partitioned for.
        folder: empty folder that keeps run and export; None: a temporary folder that is removed.

    Returns:
        The machine and the checkpoint, the bytes of checkpoint and export, the bytes of the largest tensor in fp32, the
        peak resident memory of the child process (mapped files included), its seconds (interpreter start included) and
        the parity figures.

    Raises:
        UserError: the configuration, a number or the folder is wrong, or the disk lacks the room.
        RunError: the export fails.
    """
    config = load_config(preset, overrides)
    stage = deepspeed_json(config).get("zero_optimization", {}).get("stage", 0)
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}; it must be at least 1")
    if folder is not None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--folder {folder} exists and is not an empty folder; name another")
    _require_room(folder or Path(tempfile.gettempdir()), config, dtype)
    if folder is not None:
        refuse_below_file(folder)
        folder.mkdir(parents=True, exist_ok=True)
    made: Any = tempfile.TemporaryDirectory(prefix="fusiontree-export-") if folder is None else nullcontext(folder)
    with made as root:
        run, output = Path(root, "run"), Path(root, "export")
        saved = write_checkpoint(run, config, stage, ranks)
        figures = _watch_export(run, output, dtype)
        sizes = {"checkpoint_bytes": _size(saved), "export_bytes": _size(output)}
    with torch.device("meta"):
        largest = max(parameter.numel() for parameter in HybridLM(config.model).parameters())
    return {
        "preset": config.name,
        "parameters": config.model.parameter_count(),
        **describe_machine(torch.device("cpu")),
        "zero_stage": stage,
        "ranks": ranks,
        "dtype": dtype,
        **sizes,
        "largest_tensor_bytes": largest * torch.float32.itemsize,
        **figures,
    }


def _require_room(folder: Path, config: RunConfig, dtype: str) -> None:
    needed = config.model.parameter_count() * (torch.float32.itemsize + DTYPES[dtype].itemsize) + MARGIN
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"checkpoint and export need {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB free; "
            "name a folder on another disk with --folder"
        )


# --- the checkpoint --------------------------------------------------------------------------------------------------


def write_checkpoint(run: Path, config: RunConfig, stage: int, ranks: int) -> Path:
    """Write a run's folder with a checkpoint of its initial weights, module by module, and return the checkpoint.

    Optimizer moments and duplicate weights, which an export only hashes, are left out.
    """
    folder = checkpoint_path(run, 1)
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = HybridLM(config.model)
    _write_weights(folder, model, config, stage, ranks)
    _write_tokenizer(run / TOKENIZER)
    state: dict[str, Any] = {"step": 1, "tokens": 0, "rows_consumed": 0, "world_size": ranks, "zero_stage": stage}
    state |= {"tokenizer_fingerprint": tokenizer_fingerprint(run / TOKENIZER), "data_fingerprint": ""}
    state |= {"eos_id": 0, "pad_id": 0, "wandb_id": None, "left_out": [], "bad_rows": []}
    state["health"] = {"skipped": 0, "bad": [], "losses": []}
    (folder / STATE_FILE).write_text(json.dumps(state))
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    gates = torch.full((config.model.num_layers, config.model.hidden_size), 0.5)
    save_file({"mean": gates}, folder / GATES_FILE)
    store.write_manifest(folder)
    return folder


def _write_weights(folder: Path, model: HybridLM, config: RunConfig, stage: int, ranks: int) -> None:
    """Write DeepSpeed's files: first as sparse files without tensor data, then each weight at its offset."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {names[parameter]: parameter.shape for parameter in group["params"]}
        for group in parameter_groups(model, config.optimizer)
    ]
    with FakeTensorMode():
        contents = list(layout.checkpoint_files(groups, stage, ranks))
    for name, content in contents:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, folder / name)
    located = locate_weights(folder, stage)
    paths = {module: path for path, module in model.named_modules()}
    with progress_bar() as bar:
        task = bar.add_task("checkpoint", total=len(located), note="")
        for module in materialize(model, seeded_init(config.seed), torch.device("cpu")):
            for name, parameter in module.named_parameters(paths[module], recurse=False):
                _fill(located[name], parameter.detach())
                bar.update(task, advance=1, note=name)
            module.to_empty(device="meta", recurse=False)


def _fill(place: StoredTensor, value: Tensor) -> None:
    raw: Any = value.reshape(-1).view(torch.uint8).numpy()
    done = 0
    for path, offset, count in place.extents:
        end = done + count * value.dtype.itemsize
        with open(path, "r+b") as stream:
            stream.seek(offset)
            stream.write(raw[done:end])
        done = end


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer without words; the benchmark encodes no text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir()
    Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / TOKENIZER_FILE))
    settings = {"eos_token": "<eos>"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))


# --- the export ------------------------------------------------------------------------------------------------------


def _watch_export(run: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Run ``fusiontree export`` and return its peak resident memory in bytes, its seconds and its parity figures."""
    words = ["export", str(run), str(output), "--dtype", dtype, "--json"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "fusiontree", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                peak = max(peak, _peak_resident(process.pid))
                time.sleep(POLL)
        finally:
            process.terminate()  # after an interrupt, the child must remove its output before the folder goes
            process.wait()
        output_text, _ = process.communicate()
    if process.returncode:
        raise RunError(f"the export of {run} exited with code {process.returncode}; see its error above")
    seconds = time.perf_counter() - started
    return {"peak_memory_bytes": peak, "seconds": seconds, "parity": json.loads(output_text)["parity"]}


def _peak_resident(process: int) -> int:
    """Return the peak resident memory of a process in bytes, mapped files included; 0 once it has exited.

    `VmHWM` starts at zero for a new program, whereas `ru_maxrss` inherits the peak of the parent.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
