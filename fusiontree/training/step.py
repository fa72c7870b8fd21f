"""One optimizer update under DeepSpeed: all that training and its benchmark must do alike."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree import distributed
from fusiontree.config import RunConfig
from fusiontree.data.batch import Batch
from fusiontree.distributed import World
from fusiontree.model.block import Branch
from fusiontree.model.documents import to_device
from fusiontree.model.lm import branch_drops
from fusiontree.training.build import build_engine
from fusiontree.training.gates import GateStatistics
from fusiontree.training.schedule import learning_rate


class Update(NamedTuple):
    """What an update has come to; a share is this rank's, and the shares of all ranks add up to the mean."""

    loss: float  # mean over the batch, nats per token, the same on every rank
    own_loss: Tensor  # (), fp32, on the device: share of `loss`
    grad_norm: Tensor | float  # of the whole gradient before clipping, the same on every rank
    gates: Tensor  # [layers, H], fp32, on the device: share of the mean gates
    skipped: bool  # loss or gradient was not finite, so weights and optimizer are as before; the same on every rank
    stop: bool  # some rank has been asked to stop


class TrainingStep:
    """The model under DeepSpeed, its optimizer and its gate statistics; all ranks make one and call it together."""

    def __init__(self, config: RunConfig, world: World):
        self.config, self.world = config, world
        self.engine = build_engine(config, world)
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.gates = GateStatistics(config.model.num_layers, config.model.hidden_size, world)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def update(self, batches: Sequence[Batch], step: int, stop: bool = False) -> Update:
        """Make update `step` (from 0) from this rank's share of its batch, unless loss or gradient is not finite.

        Args:
            batches: one for each accumulation step.
            step: decides the learning rate and the branches that are dropped.
            stop: whether this rank has been asked to stop; all are told.
        """
        self._set_learning_rate(step)
        drops = branch_drops(self.config.model, self.config.seed, step)
        real = torch.tensor(float(sum(batch.real_tokens for batch in batches)), device=self.world.device)
        tokens = distributed.sum_over_ranks(real).clamp(min=1)
        loss = torch.zeros((), device=self.world.device)
        gates = torch.zeros_like(self.gates.share)
        self.engine.train()
        for batch in batches:
            loss_sum, batch_gates = self.forward(batch, drops)
            loss += loss_sum.detach() / tokens
            gates += batch_gates.detach() * (batch.real_tokens / tokens)
            # the engine averages gradients over the ranks: the factor turns that into the sum over all tokens
            factor = self.world.size / tokens
            # and makes the gradient of a loss that is not finite NaN, on all ranks, though it might be finite itself
            self.engine.backward(loss_sum * (factor + 0 * loss_sum.detach()), scale_wrt_gas=False)
            if self.engine.is_gradient_accumulation_boundary():
                told = distributed.HostSum(torch.stack([loss, torch.full_like(loss, stop)]))
                norm, skipped = self._step()
            else:
                self.engine.step()
        mean_loss, stops = told.read()
        if not skipped:
            self.gates.update(gates)
        return Update(mean_loss, loss, norm, gates, skipped, stops > 0)

    def _step(self) -> tuple[Tensor | float, bool]:
        """Let the optimizer step if the gradient is finite: its norm, and whether the step was left out.

        Finding that out waits for the backward pass; in ZeRO, DeepSpeed does.
        """
        if self.engine.zero_optimization_stage() > 0:
            self.engine.step()
            return self.engine.get_global_grad_norm(), self.engine.optimizer.overflow
        norm = _total_norm(
            self.engine.module
        )  # without ZeRO the engine clips but neither tells the norm nor looks at it
        if math.isfinite(norm.item()):
            self.engine.step()
            return norm, False
        self.engine.zero_grad()
        self.engine.micro_steps += 1  # by which the engine knows where an update ends
        return norm, True

    def forward(self, batch: Batch, drops: list[Branch | None] | None = None) -> tuple[Tensor, Tensor]:
        """The batch's summed loss in nats, (), and its mean gates, [layers, H]; both fp32.

        Args:
            batch: rows on the host.
            drops: by layer, the branch to zero.
        """
        input_ids, labels, documents = to_device(batch, self.world.device)
        output = self.engine(input_ids, documents, labels=labels, branch_drops=drops)
        return output.loss_sum, output.gates

    def _set_learning_rate(self, step: int) -> None:
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(self.config.schedule, peak, step)


def _total_norm(model: torch.nn.Module) -> Tensor:
    """Euclidean norm of the whole gradient, ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
