"""Pruning a run's model by measurement: what goes, and what the model loses and saves by it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint import store
from fusiontree.config import RunConfig, load_config
from fusiontree.data.sources import open_held_out
from fusiontree.device import accelerator
from fusiontree.errors import UserError
from fusiontree.evaluate.held_out import held_out_loss
from fusiontree.inference.speed import UNTIMED_STEPS, measure_decoding
from fusiontree.kernels import DTYPES, choose_kernels
from fusiontree.model.lm import HybridLM
from fusiontree.prune.plan import (
    Pruning,
    branch_candidates,
    cache_bytes,
    head_candidates,
    least_loss,
    make_plan,
    planned,
    pruned_model,
    read_plan,
)
from fusiontree.run.folder import CONFIG_FILE, TOKENIZER, run_of

HI, LO = 0.8, 0.2  # of a plan, where nothing else is said
_DECODED = 16  # tokens made to time a step


def plan_run(source: Path, hi: float = HI, lo: float = LO) -> dict[str, Any]:
    """The pruning plan of a run's newest checkpoint, or of a checkpoint.

    Raises:
        UserError: there is none, or the bounds are not in order. RunError: it does not verify.
    """
    found = store.resolve(source)
    config = load_config(str(found / CONFIG_FILE))
    plan = make_plan(config.model, store.read_gates(found), hi, lo, config.data.seq_len)
    return {"checkpoint": str(found), **plan}


class Pruner:
    """A run's model in memory, on the device here, and held-out rows to measure it by."""

    def __init__(
        self,
        found: Path,
        config: RunConfig,
        weights: Mapping[str, Tensor],
        data: Path | None = None,
        limit: int | None = None,
    ):
        """`found`: the checkpoint. `data`: a dataset; None: the run's own. `limit`: of its held-out rows, at most."""
        locations = config.data.locations if data is None else {"": str(data)}
        if not locations:
            raise UserError("the run names no dataset to measure the pruning by; give one with --data")
        fingerprint = store.read_state(found)["tokenizer_fingerprint"]
        self.held_out = open_held_out(locations)
        for dataset in self.held_out.datasets:
            dataset.manifest.require_tokenizer(fingerprint, run_of(found) / TOKENIZER)
        self.config, self.limit = config, limit
        self.device = torch.device(accelerator())
        self.gates = store.read_gates(found).to(self.device)
        self.weights = {name: weights[name].to(self.device) for name in weights}

    def model(self, pruning: Pruning) -> HybridLM:
        """What `pruning` leaves."""
        config, dtype = self.config, DTYPES[self.config.precision]
        kernels = choose_kernels(self.device.type, config.kernels.model_dump(), config.model, dtype)
        return pruned_model(self.weights, config.model, pruning, self.gates, kernels, dtype)

    def loss(self, note: str, pruning: Pruning) -> float:
        """Held-out loss of what `pruning` leaves, nats per token."""
        return held_out_loss(self.model(pruning), self.held_out, self.config.data.seq_len, self.limit, note)

    def prune(self, prune: str | None, heads: int) -> tuple[Pruning, dict[str, Any]]:
        """What to prune, and the report: loss, size and speed before and after, the loss without each candidate.

        The plan that says the same is in it, too.
        A speed that could not be measured has in its place the line that says why (`problem`).

        Arguments as of `export`.
        """
        pruning, measured = self._choose(prune, heads)
        before, after = self._figures(Pruning.none(self.config.model)), self._figures(pruning)
        return pruning, {"before": before, "after": after, "loss_without": measured, "plan": pruning.plan()}

    def _choose(self, prune: str | None, heads: int) -> tuple[Pruning, dict[str, float]]:
        config = self.config.model
        if prune is not None and heads:
            raise UserError("--prune and --prune-heads are both given; take one, or edit a plan's global_groups")
        if heads:
            return least_loss(head_candidates(config), heads, config, self.loss)
        if prune is not None and re.fullmatch("-?[0-9]{1,9}", prune):
            return least_loss(branch_candidates(config), int(prune), config, self.loss)
        if prune == "auto":
            return planned(make_plan(config, self.gates.cpu(), HI, LO, self.config.data.seq_len), config, "auto"), {}
        return read_plan(Path(prune or ""), config), {}

    def _figures(self, pruning: Pruning) -> dict[str, Any]:
        shape, tokens = pruning.config(self.config.model), self.config.data.seq_len
        speed = measure_decoding(self.model(pruning), 1, max(1, tokens - _DECODED - UNTIMED_STEPS), _DECODED)
        return {
            "loss": self.loss("held-out loss", pruning),
            "parameters": shape.parameter_count(),
            "cache_bytes": cache_bytes(shape, tokens),
            **{key: speed[key] for key in ("prefill_tokens_per_s", "tokens_per_s", "problem") if key in speed},
        }
