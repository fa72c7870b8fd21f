"""Pruning of a run's model, with loss, size and speed measured before and after."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint import store
from fusiontree.config import RunConfig, load_config
from fusiontree.data.format import Dataset
from fusiontree.data.remote import Cache
from fusiontree.data.sources import held_out_sources
from fusiontree.device import accelerator
from fusiontree.errors import UserError
from fusiontree.evaluate.held_out import held_out_loss
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding
from fusiontree.kernels import DTYPES, choose_kernels
from fusiontree.model.lm import HybridLM
from fusiontree.paths import local_path
from fusiontree.prune.plan import (
    Pruning,
    branch_candidates,
    cache_bytes,
    head_candidates,
    make_plan,
    parse_plan,
    pruned_model,
    read_plan,
    select_cheapest,
)
from fusiontree.run.folder import CONFIG_FILE, TOKENIZER, run_of

HI, LO = 0.8, 0.2  # default bounds of a plan
_DECODED = 16  # timed decoding steps


def plan_run(source: Path, hi: float = HI, lo: float = LO) -> dict[str, Any]:
    """Return the pruning plan of a checkpoint, or of a run's newest one.

    Raises:
        UserError: there is no checkpoint, or the bounds are out of range.
        RunError: the checkpoint does not verify.
    """
    with contextlib.ExitStack() as pins:
        checkpoint = store.resolve(source, pins)
        config = load_config(str(checkpoint / CONFIG_FILE))
        gates = store.read_gates(checkpoint, config.model)
    plan = make_plan(config.model, gates, hi, lo, config.data.seq_len)
    return {"checkpoint": str(checkpoint), **plan}


class Pruner:
    """A run's model on this machine's device, and the held-out rows to measure it on."""

    def __init__(
        self,
        checkpoint: Path,
        config: RunConfig,
        weights: Mapping[str, Tensor],
        data: str | None = None,
        limit: int | None = None,
    ):
        """Load the weights and open the held-out rows.

        Args:
            checkpoint: folder of the checkpoint.
            data: dataset's folder or address; None: the run's own datasets.
            limit: maximum number of held-out rows; None: all.
        """
        locations = config.data.locations if data is None else {"": data}
        if not locations:
            raise UserError("the run has no dataset to measure the pruning on; give one with --data")
        fingerprint = store.read_state(checkpoint)["tokenizer_fingerprint"]
        cache = Cache(config.data.cache, config.data.cache_bytes)
        datasets = {name: Dataset(location, "validation", cache) for name, location in locations.items()}
        self.held_out = held_out_sources(datasets)
        for dataset in self.held_out.datasets:
            dataset.manifest.require_tokenizer(fingerprint, run_of(checkpoint) / TOKENIZER)
        self.config, self.limit = config, limit
        self.device = torch.device(accelerator())
        self.gates = store.read_gates(checkpoint, config.model).to(self.device)
        self.weights = {name: weights[name].to(self.device) for name in weights}

    def model(self, pruning: Pruning) -> HybridLM:
        """Return the pruned model."""
        config, dtype = self.config, DTYPES[self.config.precision]
        kernels = choose_kernels(self.device.type, config.kernels.model_dump(), config.model, dtype)
        return pruned_model(self.weights, config.model, pruning, self.gates, kernels, dtype)

    def loss(self, note: str, pruning: Pruning) -> float:
        """Return the held-out loss of the pruned model, nats per token."""
        return held_out_loss(self.model(pruning), self.held_out, self.config.data.seq_len, self.limit, note)

    def prune(self, prune: str | None, heads: int) -> tuple[Pruning, dict[str, Any]]:
        """Choose the parts to prune and measure the result; arguments as in `ExportOptions`.

        Returns:
            The pruning, and its report: loss, size and speed before and after (`problem` if the speed could not be
            measured), the loss without each candidate, and the plan.
        """
        pruning, measured = self._choose(prune, heads)
        before, after = self._figures(Pruning.none(self.config.model)), self._figures(pruning)
        return pruning, {"before": before, "after": after, "loss_without": measured, "plan": pruning.to_plan()}

    def _choose(self, prune: str | None, heads: int) -> tuple[Pruning, dict[str, float]]:
        config = self.config.model
        if prune is not None and heads:
            raise UserError("--prune and --prune-heads cannot be combined; use one, or edit global_groups in a plan")
        if heads:
            return select_cheapest(head_candidates(config), heads, config, self.loss)
        if prune is not None and re.fullmatch("-?[0-9]{1,9}", prune):
            return select_cheapest(branch_candidates(config), int(prune), config, self.loss)
        if prune == "auto":
            return parse_plan(make_plan(config, self.gates.cpu(), HI, LO, self.config.data.seq_len), config, "auto"), {}
        return read_plan(local_path(prune or ""), config), {}

    def _figures(self, pruning: Pruning) -> dict[str, Any]:
        shape, tokens = pruning.apply(self.config.model), self.config.data.seq_len
        speed = measure_decoding(self.model(pruning), 1, max(1, tokens - _DECODED - UNTIMED_STEPS), _DECODED)
        return {
            "loss": self.loss("held-out loss", pruning),
            "parameters": shape.parameter_count(),
            "cache_bytes": cache_bytes(shape, tokens),
            **{key: speed[key] for key in ("prefill_tokens_per_s", "tokens_per_s", "problem") if key in speed},
        }
