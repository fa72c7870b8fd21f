"""One optimizer update under DeepSpeed: all that training and its benchmark must do alike."""

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
from fusiontree.training.engine_setup import build_engine
from fusiontree.training.gates import GateStatistics
from fusiontree.training.layer_watch import LayerWatch
from fusiontree.training.objective import Objective, gate_penalty
from fusiontree.training.schedule import learning_rate


class Update(NamedTuple):
    """What an update has come to. A share is this rank's, on the device; the shares of all ranks add up to the mean."""

    loss: float  # mean cross-entropy of the batch, nats per token, the same on every rank
    own_loss: Tensor  # (), fp32: share of `loss`
    grad_norm: Tensor | float  # of the whole gradient before clipping, the same on every rank
    gates: Tensor  # [layers, H], fp32: share of the mean gates
    parts: dict[str, Tensor]  # (), fp32: shares of what else was minimised, by the name that metrics give it
    skipped: bool  # loss or gradient was not finite, so weights and optimizer are as before; the same on every rank
    stop: bool  # some rank has been asked to stop


class TrainingStep:
    """The model under DeepSpeed, its optimizer and its gate statistics; all ranks make one and call it together."""

    def __init__(self, config: RunConfig, world: World, resuming: bool = False):
        """Begin; one that `resuming` has no weights until a checkpoint is loaded."""
        self.config, self.world = config, world
        self.objective = Objective(config, world.device)
        self.engine, self.clipping = build_engine(config, world, resuming)
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.gates = GateStatistics(config.model.num_layers, config.model.hidden_size, world)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def update(
        self, batches: Sequence[Batch], step: int, stop: bool = False, watch: LayerWatch | None = None
    ) -> Update:
        """Make update `step` (from 0) from this rank's share of its batch, unless loss or gradient is not finite.

        Args:
            batches: one for each accumulation step.
            step: decides the learning rate, the weights of the losses and the branches that are dropped.
            stop: whether this rank has been asked to stop; all are told.
            watch: what looks at this update layer by layer, entered.
        """
        self._set_learning_rate(step)
        drops = branch_drops(self.config.model, self.config.seed, step)
        own_tokens = torch.tensor(float(sum(batch.real_tokens for batch in batches)), device=self.world.device)
        tokens = collectives.sum_over_ranks(own_tokens.clone()).clamp(min=1)
        parts, slope = self._gate_penalty(step)
        gates = torch.zeros_like(self.gates.share)
        self.engine.train()
        for batch in batches:
            ids, labels, documents = to_device(batch, self.world.device)
            options = self.objective.options(ids, documents, step)
            output = self.engine(ids, documents, labels=labels, branch_drops=drops, **options)
            share = output.gates * (batch.real_tokens / tokens)
            total, reported = self.objective.of(output, step)
            self._backward(total / tokens + (0.0 if slope is None else (slope * share).sum()))
            gates += share.detach()
            for name, value in reported.items():
                parts[name] = parts.get(name, 0.0) + value / tokens
            if self.engine.is_gradient_accumulation_boundary():
                broken = self.clipping.prepare()
                # on its way to the host while the device makes the step
                news = [parts["loss"], torch.full_like(broken, stop), broken, own_tokens]
                told = collectives.HostSum(torch.stack(news))
                if watch is not None:
                    watch.meet_gradients()
                self.clipping.step()
            else:
                self.engine.step()
        loss, stops, breaks, real = told.read()
        norm, skipped = self.clipping.outcome(breaks > 0)
        if real and not skipped:  # a batch of padding alone has no gates
            self.gates.update(gates)
        return Update(loss, parts.pop("loss"), norm, gates, parts, skipped, stops > 0)

    def token_losses(self, batch: Batch) -> Tensor:
        """The batch's loss by token in nats, fp32 [B, L], 0 where there is no label; without gradient."""
        input_ids, labels, documents = to_device(batch, self.world.device)
        return self.engine(input_ids, documents, labels=labels, by_token=True).token_losses

    def _gate_penalty(self, step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """This rank's share of the penalty on the gates, and the slope of the whole, if the run has one."""
        if not self.config.losses.shapes_gates:
            return {}, None
        mean = collectives.sum_over_ranks(self.gates.share.clone())
        penalty, slope = gate_penalty(mean, self.config.losses, step)
        return {"gate_penalty": penalty / self.world.size}, slope

    def _backward(self, objective: Tensor) -> None:
        """Add the gradient of this rank's share of the objective; where that is not finite, all of it is NaN."""
        # the engine averages gradients over the ranks: the factor turns that into their sum
        self.engine.backward(objective * (self.world.size + 0 * objective.detach()), scale_wrt_gas=False)

    def _set_learning_rate(self, step: int) -> None:
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(self.config.schedule, peak, step)
