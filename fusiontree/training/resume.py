"""Preparation of the run's folder at a start, and checks of the checkpoint to resume from."""

import contextlib
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
from fusiontree.errors import UserError
from fusiontree.files import copy_files, plain_files, write_atomic
from fusiontree.model.config import ModelConfig
from fusiontree.model.lm import HybridLM
from fusiontree.run import incidents, lease
from fusiontree.run.changes import DATA, TOKENIZER_DATA, check_changes
from fusiontree.run.folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER, list_checkpoints, refuse_foreign, step_of
from fusiontree.training.init_weights import check_init_from

_FIXED = ("optimizer.kind",)  # never allowed to change: the checkpoint's moments belong to this optimizer


def prepare_folder(
    config: RunConfig, data: Sources, allow_changed: Sequence[str] = (), trust: bool = False
) -> Path | None:
    """Make the run's folder on the main rank and take its lease; return the checkpoint to resume from. Collective.

    Args:
        config: the run.
        data: the run's training data.
        allow_changed: keys whose values may differ from the checkpoint's, see `check_changes`.
        trust: accept a checkpoint that can execute code.

    Raises:
        UserError: the folder contains something else, or the checkpoint is of another run, does not fit the
            configuration, or can execute code and is not trusted.
        RunError: there are checkpoints and none verifies.
    """

    def prepare() -> Path | None:
        with contextlib.ExitStack() as pins:  # until the lease is taken, a running attempt could remove the checkpoint
            return _prepare_folder(config, data, allow_changed, trust, pins)

    return collectives.on_main(prepare)


def _prepare_folder(
    config: RunConfig, data: Sources, allow_changed: Sequence[str], trust: bool, pins: contextlib.ExitStack
) -> Path | None:
    run = config.run_dir
    for folder in (dataset.folder for dataset in data.datasets):
        if run.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"run folder {run} and dataset {folder} must not contain each other; set another output or name"
            )
    refuse_foreign(run)
    store.restore_replaced(run / CHECKPOINTS)
    found = newest_verified(run, pins)
    if found is not None:
        if not trust:
            store.refuse_code(found)
        _check_resume(config, data, found, allow_changed)
    tokenizers = [dataset.folder / "tokenizer" for dataset in data.datasets]
    for dataset, tokenizer in zip(data.datasets, tokenizers, strict=True):
        dataset.manifest.require_tokenizer(tokenizer_fingerprint(tokenizer), tokenizer)
        plain_files(tokenizer)
    if found is None:
        check_init_from(config, data.datasets[0].manifest)
    run.mkdir(parents=True, exist_ok=True)
    lease.take(run)
    store.tidy(run / CHECKPOINTS)
    write_atomic(run / CONFIG_FILE, to_yaml(config))
    copy_files(tokenizers[0], run / TOKENIZER)
    return found


def newest_verified(run: Path, pins: contextlib.ExitStack | None = None) -> Path | None:
    """Return the newest checkpoint of `run` that verifies; print and record newer damaged ones.

    Args:
        run: the run's folder.
        pins: see `store.newest`.

    Returns:
        None if the run has no checkpoints.

    Raises:
        RunError: there are checkpoints and none verifies.
    """
    found, damaged = store.newest(run / CHECKPOINTS, pins)
    for path, line in damaged.items():
        console.print(line)
        incidents.record(run, "fallback", step_of(path), line)
    return found


def read_position(config: RunConfig, path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Return the data position of the checkpoint at `path`, in rows of `config`'s length.

    Returns:
        Rows consumed, and the ranges of rows that rollbacks skip.

    Raises:
        UserError: a position is not a multiple of `config`'s batch.
    """
    state, seq_len = store.read_state(path), load_config(str(path / CONFIG_FILE)).data.seq_len
    rows = [state["rows_consumed"], *(row for ends in state["left_out"] for row in ends)]
    tokens = [row * seq_len for row in rows]
    if any(position % config.batch.tokens for position in tokens):
        raise UserError(
            f"{path} was saved after {tokens[0]} tokens, inside a batch of batch.tokens {config.batch.tokens}; use a "
            "batch.tokens that divides that number"
        )
    consumed, *ends = (position // config.data.seq_len for position in tokens)
    return consumed, list(zip(ends[::2], ends[1::2], strict=True))


def seek_before(step: int, config: RunConfig, stream: TrainStream) -> int:
    """Place `stream` at the newest checkpoint not after `step`; return the number of steps from there to `step`.

    Without such a checkpoint `stream` stays at its beginning. Rows that the run's rollbacks skipped are skipped too.

    Raises:
        UserError: see `read_position`.
    """
    saved = [
        path
        for path in list_checkpoints(config.run_dir / CHECKPOINTS)
        if store.read_state(path)["data_fingerprint"] == stream.sources.fingerprint
    ]
    if not saved:
        return step
    stream.skip_ranges(read_position(config, saved[-1])[1])
    before = [path for path in saved if step_of(path) <= step]
    if not before:
        return step
    stream.seek(read_position(config, before[-1])[0])
    return step - step_of(before[-1])


def _check_resume(config: RunConfig, data: Sources, path: Path, allow_changed: Sequence[str]) -> None:
    """Raise UserError unless `config` can resume from the checkpoint at `path`; print and record allowed changes."""
    before, state = load_config(str(path / CONFIG_FILE)), store.read_state(path)
    differing = check_changes(before, config, allow_changed, _data_changes(state, data))
    if state["step"] > config.schedule.steps:
        raise UserError(
            f"{path} was saved after step {state['step']:,}, beyond schedule.steps {config.schedule.steps:,}; raise "
            "schedule.steps, or set another name"
        )
    impossible = [key for key in differing if key in _FIXED]
    if _shapes(before.model) != _shapes(config.model):
        impossible += [key for key in differing if key.startswith("model.")]
    if impossible:
        raise UserError(
            f"the weights in {path} do not fit other values of {', '.join(impossible)}; restore the old values"
        )
    read_position(config, path)
    store.read_gates(path, config.model)
    if differing:
        line = f"resuming with other values of {', '.join(differing)}, as --allow-changed permits"
        console.print(line)
        incidents.record(config.run_dir, "changed", step_of(path), line, keys=differing)


def _data_changes(state: dict[str, Any], data: Sources) -> list[str]:
    """Return which fingerprints of `data` differ from those in a checkpoint's `state`."""
    fingerprints = {DATA: data.fingerprint, TOKENIZER_DATA: data.datasets[0].manifest.tokenizer_fingerprint}
    return [fact for fact, fingerprint in fingerprints.items() if state[f"{fact}_fingerprint"] != fingerprint]


def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in HybridLM(model).named_parameters()}
