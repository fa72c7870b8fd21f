"""The run's folder at a start: made, or found with a checkpoint that this run may go on from."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint import store
from fusiontree.config import RunConfig, load_config, to_yaml
from fusiontree.console import console
from fusiontree.data.format import tokenizer_fingerprint
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.errors import UserError
from fusiontree.files import refuse_existing, write_atomic
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.run import incidents, lease
from fusiontree.run.changes import DATA, TOKENIZER_DATA, check_changes
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER, list_checkpoints, step_of
from fusiontree.training.init_weights import check_initial

_NEVER = ("optimizer.kind",)  # the optimizer's state would mean nothing


def prepare_folder(
    config: RunConfig, world: World, data: Sources, allow_changed: Sequence[str] = (), trust: bool = False
) -> Path | None:
    """Make the run's folder; the checkpoint there to go on from, if any. The main rank does it for all.

    Raises:
        UserError: the folder holds something else, or another run than `config` describes, but for `allow_changed`; or
            the checkpoint could run code and is not trusted (`trust`).
    """
    return collectives.on_main(lambda: _prepare_folder(config, world, data, allow_changed, trust))


def _prepare_folder(
    config: RunConfig, world: World, data: Sources, allow_changed: Sequence[str], trust: bool
) -> Path | None:
    run = config.run_dir
    for folder in (dataset.folder for dataset in data.datasets):
        if run.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(run.resolve()):
            raise UserError(f"run folder {run} and dataset {folder} lie in each other; set another output or name")
    refuse_existing(run, overwrite=True, marker=CONFIG_FILE)
    store.tidy(run / CHECKPOINTS)
    found = last_good(run)
    if found is not None:
        if not trust:
            store.refuse_code(found)
        _check_same(config, data, found, allow_changed)
    tokenizers = [dataset.folder / "tokenizer" for dataset in data.datasets]
    for dataset, tokenizer in zip(data.datasets, tokenizers, strict=True):
        dataset.manifest.require_tokenizer(tokenizer_fingerprint(tokenizer), tokenizer)
    if found is None:
        check_initial(config, data.datasets[0].manifest)
    run.mkdir(parents=True, exist_ok=True)
    lease.take(run)
    write_atomic(run / CONFIG_FILE, to_yaml(config))
    shutil.copytree(tokenizers[0], run / TOKENIZER, dirs_exist_ok=True)
    return found


def last_good(run: Path) -> Path | None:
    """The newest checkpoint of `run` that verifies, if there are any; newer ones that do not are said and recorded.

    Raises:
        RunError: there are checkpoints and none verifies.
    """
    found, damaged = store.newest(run / CHECKPOINTS)
    for path, line in damaged.items():
        console.print(line, markup=False)
        incidents.record(run, "fallback", step_of(path), line)
    return found


def read_place(config: RunConfig, path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Where the checkpoint at `path` stands in the data: rows consumed, of `config`'s length, and what is left out.

    Raises:
        UserError: that is inside a batch of `config`.
    """
    state, seq_len = store.read_state(path), load_config(str(path / CONFIG_FILE)).data.seq_len
    rows = [state["rows_consumed"], *(row for ends in state["left_out"] for row in ends)]
    tokens = [row * seq_len for row in rows]
    if any(place % config.batch.tokens for place in tokens):
        raise UserError(
            f"{path} stands behind {tokens[0]} tokens, inside a batch of batch.tokens {config.batch.tokens}; take one "
            "that divides them"
        )
    consumed, *ends = (place // config.data.seq_len for place in tokens)
    return consumed, list(zip(ends[::2], ends[1::2], strict=True))


def seek_before(step: int, config: RunConfig, stream: TrainStream) -> int:
    """Place `stream` where the run stood last before `step`, as far as checkpoints tell; the steps from there on.

    What the run has stepped past after a rollback is passed over.

    Raises:
        UserError: as of `read_place`.
    """
    saved = [
        path
        for path in list_checkpoints(config.run_dir / CHECKPOINTS)
        if store.read_state(path)["data_fingerprint"] == stream.sources.fingerprint
    ]
    if not saved:
        return step
    stream.skip_ranges(read_place(config, saved[-1])[1])
    before = [path for path in saved if step_of(path) <= step]
    if not before:
        return step
    stream.seek(read_place(config, before[-1])[0])
    return step - step_of(before[-1])


def _check_same(config: RunConfig, data: Sources, path: Path, allow_changed: Sequence[str]) -> None:
    """Raise UserError if the run of the checkpoint at `path` is not the one that `config` describes."""
    before = load_config(str(path / CONFIG_FILE))
    differing = check_changes(before, config, allow_changed, _data_changes(store.read_state(path), data))
    impossible = [key for key in differing if key in _NEVER]
    if _shapes(before.model) != _shapes(config.model):
        impossible += [key for key in differing if key.startswith("model.")]
    if impossible:
        raise UserError(f"the weights in {path} do not fit other values of {', '.join(impossible)}; restore them")
    read_place(config, path)
    if differing:
        line = f"went on with other values of {', '.join(differing)}, as allowed"
        console.print(line)
        incidents.record(config.run_dir, "changed", step_of(path), line, keys=differing)


def _data_changes(state: dict[str, Any], data: Sources) -> list[str]:
    """Return which facts of the data differ from those of a checkpoint with `state`."""
    fingerprints = {DATA: data.fingerprint, TOKENIZER_DATA: data.datasets[0].manifest.tokenizer_fingerprint}
    return [fact for fact, fingerprint in fingerprints.items() if state[f"{fact}_fingerprint"] != fingerprint]


def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in HybridLM(model).named_parameters()}
