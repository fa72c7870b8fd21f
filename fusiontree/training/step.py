"""One optimizer update under DeepSpeed: all that training and its benchmark must do alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree import distributed
from fusiontree.config import RunConfig
from fusiontree.data.batch import Batch
from fusiontree.distributed import World
from fusiontree.model.documents import to_device
from fusiontree.model.lm import branch_drops
from fusiontree.training.build import build_engine
from fusiontree.training.gates import GateStatistics
from fusiontree.training.losses import Objective, gate_penalty
from fusiontree.training.schedule import learning_rate


class Update(NamedTuple):
    """What an update leaves on the device; a share is this rank's, and the shares of all ranks add up to the mean."""

    loss: Tensor  # (), fp32: share of the mean cross-entropy, nats per token
    grad_norm: Tensor | float  # of the whole gradient before clipping, the same on every rank
    gates: Tensor  # [layers, H], fp32: share of the mean gates
    parts: dict[str, Tensor]  # (), fp32: shares of what else was minimised, by the name that metrics give it


class TrainingStep:
    """The model under DeepSpeed, its optimizer and its gate statistics; all ranks make one and call it together."""

    def __init__(self, config: RunConfig, world: World):
        self.config, self.world = config, world
        self.objective = Objective(config, world.device)
        self.engine = build_engine(config, world)
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.gates = GateStatistics(config.model.num_layers, config.model.hidden_size, world)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def update(self, batches: Sequence[Batch], step: int) -> Update:
        """Make update `step` (from 0) from this rank's share of its batch.

        Args:
            batches: one for each accumulation step.
            step: decides the learning rate, the weights of the losses and the branches that are dropped.
        """
        self._set_learning_rate(step)
        drops = branch_drops(self.config.model, self.config.seed, step)
        real = torch.tensor(float(sum(batch.real_tokens for batch in batches)), device=self.world.device)
        tokens = distributed.sum_over_ranks(real).clamp(min=1)
        parts, slope = self._gate_penalty(step)
        gates = torch.zeros_like(self.gates.share)
        self.engine.train()
        for batch in batches:
            ids, labels, documents = to_device(batch, self.world.device)
            options = self.objective.options(ids, documents, step)
            output = self.engine(ids, documents, labels=labels, branch_drops=drops, **options)
            share = output.gates * (batch.real_tokens / tokens)
            total, reported = self.objective.of(output, step)
            penalty = 0.0 if slope is None else (slope * share).sum()
            norm = self._descend(total / tokens + penalty)
            gates += share.detach()
            for name, value in reported.items():
                parts[name] = parts.get(name, 0.0) + value / tokens
        self.gates.update(gates)
        return Update(parts.pop("loss"), norm, gates, parts)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's summed cross-entropy in nats, (), and its mean gates, [layers, H]; both fp32."""
        ids, labels, documents = to_device(batch, self.world.device)
        output = self.engine(ids, documents, labels=labels)
        return output.loss_sum, output.gates

    def _gate_penalty(self, step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """This rank's share of the penalty on the gates, and the slope of the whole, if the run has one."""
        if not self.config.losses.shapes_gates:
            return {}, None
        mean = distributed.sum_over_ranks(self.gates.share.clone())
        penalty, slope = gate_penalty(mean, self.config.losses, step)
        return {"gate_penalty": penalty / self.world.size}, slope

    def _descend(self, objective: Tensor) -> Tensor | float:
        """Add the gradient of this rank's share of the objective and, with the last batch, update the weights.

        Returns:
            The norm of the whole gradient, once it is there.
        """
        engine = self.engine
        norm: Tensor | float = 0.0
        # the engine averages gradients over the ranks: the factor turns that into their sum
        engine.backward(objective * self.world.size, scale_wrt_gas=False)
        if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
            norm = _total_norm(engine.module)  # without ZeRO the engine clips but does not tell the norm
        engine.step()
        return norm if engine.zero_optimization_stage() == 0 else engine.get_global_grad_norm()

    def _set_learning_rate(self, step: int) -> None:
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(self.config.schedule, peak, step)


def _total_norm(model: torch.nn.Module) -> Tensor:
    """Euclidean norm of the whole gradient, ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
