"""One optimizer update under DeepSpeed, shared by training and its benchmark."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.config import RunConfig
from fusiontree.data.batch import Batch
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.model.documents import to_device
from fusiontree.model.lm import branch_drops
from fusiontree.training.engine_setup import build_engine, fp8_products
from fusiontree.training.gates import GateStatistics
from fusiontree.training.layer_watch import LayerWatch
from fusiontree.training.objective import Objective, gate_penalty
from fusiontree.training.schedule import set_learning_rates


class Update(NamedTuple):
    """Result of an update. A share is one rank's summand, on its device: summed over the ranks, it is the mean."""

    loss: float  # mean cross-entropy of the batch, nats per token, NaN if empty; identical on every rank
    empty: bool  # no token of the batch has a label; identical on every rank
    loss_share: Tensor  # (), fp32: share of `loss`
    grad_norm: Tensor | float  # global gradient norm before clipping; identical on every rank
    gates: Tensor  # [layers, H], fp32: share of the mean gates
    parts: dict[str, Tensor]  # (), fp32: shares of the other terms of the objective, by their names in metrics.jsonl
    skipped: bool  # non-finite loss or gradient, or empty: weights and optimizer unchanged; identical on every rank
    stop: bool  # some rank received a stop signal


class TrainingStep:
    """The model under DeepSpeed with its optimizer, objective and gate statistics. Collective: all ranks call it."""

    def __init__(self, config: RunConfig, world: World, resuming: bool = False):
        """Build the engine; `resuming` leaves the weights zero until a checkpoint is loaded."""
        self.config, self.world = config, world
        self.objective = Objective(config, world.device)
        self.engine, self.clipping = build_engine(config, world, resuming)
        self.fp8 = fp8_products(config, self.engine)
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.gates = GateStatistics(config.model.num_layers, config.model.hidden_size, world)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def update(
        self, batches: Sequence[Batch], step: int, stop: bool = False, watch: LayerWatch | None = None
    ) -> Update:
        """Run update `step` (from 0) on this rank's share of the batch; skip it if loss or gradient is not finite.

        A batch without a token to predict has no mean: its loss is 0 / 0, so its update is skipped as well.

        Args:
            batches: one for each accumulation step.
            step: selects the learning rate, the weights of the objective's terms and the dropped branches.
            stop: whether this rank received a stop signal; shared with all ranks.
            watch: an entered `LayerWatch` that records this update.
        """
        set_learning_rates(self.engine.optimizer.param_groups, self.peaks, self.config.schedule, step)
        drops = branch_drops(self.config.model, self.config.seed, step)
        own_tokens = torch.tensor(float(sum(batch.real_tokens for batch in batches)), device=self.world.device)
        tokens = collectives.sum_over_ranks(own_tokens.clone())
        parts, slope = self._gate_penalty(step)
        gates = torch.zeros_like(self.gates.share)
        self.engine.train()
        self._refresh_casts()
        for batch in batches:
            ids, labels, documents = to_device(batch, self.world.device)
            options = self.objective.options(ids, documents, step)
            output = self.engine(ids, documents, labels=labels, branch_drops=drops, **options)
            share = output.gates * (batch.real_tokens / tokens.clamp(min=1))
            total, reported = self.objective.combine(output, step)
            self._backward(total / tokens + (0.0 if slope is None else (slope * share).sum()))
            gates += share.detach()
            for name, value in reported.items():
                parts[name] = parts.get(name, 0.0) + value / tokens
            if self.engine.is_gradient_accumulation_boundary():
                nonfinite = self.clipping.prepare()
                # One reduction brings all that the host needs. It starts before the optimizer step, so its copy to the
                # host overlaps that step and `read` does not wait for it.
                figures = [parts["loss"], torch.full_like(nonfinite, stop), nonfinite, own_tokens]
                reduced = collectives.HostSum(torch.stack(figures))
                if watch is not None:
                    watch.record_gradients()
                self.clipping.step()
            else:
                self.engine.step()
        loss, stop_votes, nonfinite_ranks, real_tokens = reduced.read()
        norm, skipped = self.clipping.result(nonfinite_ranks > 0)
        if not skipped:
            self.gates.update(gates)
        return Update(loss, not real_tokens, parts.pop("loss"), norm, gates, parts, skipped, stop_votes > 0)

    def eval(self) -> None:
        """Prepare for `token_losses` of the present weights; the next `update` returns to training."""
        self.engine.eval()
        self._refresh_casts()

    def token_losses(self, batch: Batch) -> Tensor:
        """Return each token's loss in nats, fp32 [B, L], 0 without a label; without gradient. Call `eval` first."""
        input_ids, labels, documents = to_device(batch, self.world.device)
        return self.engine(input_ids, documents, labels=labels, by_token=True).token_losses

    def _refresh_casts(self) -> None:
        """Cast the weights, which a step or a checkpoint has changed, to FP8 if the run computes in it."""
        if self.fp8 is not None:
            self.fp8.refresh()

    def _gate_penalty(self, step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return this rank's share of the gate penalty and the penalty's slope, or ({}, None) if the run has none."""
        if not self.config.losses.shapes_gates:
            return {}, None
        mean = collectives.sum_over_ranks(self.gates.share.clone())
        penalty, slope = gate_penalty(mean, self.config.losses, step)
        return {"gate_penalty": penalty / self.world.size}, slope

    def _backward(self, objective: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the objective; a non-finite share makes all of it NaN.

        The shares are already divided by the tokens of the whole batch, so gradients must be summed over accumulation
        steps and ranks. DeepSpeed would average both: `scale_wrt_gas=False` disables its division by the accumulation
        steps, and the factor `world.size` cancels its division by the ranks.

        The term ``0 * objective`` is 0 for a finite share and NaN otherwise. So a share with a finite gradient, such as
        ``x + inf``, still yields a non-finite gradient norm, by which every rank skips the update.
        """
        self.engine.backward(objective * (self.world.size + 0 * objective.detach()), scale_wrt_gas=False)
