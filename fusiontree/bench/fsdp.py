"""The project's model under torch's FSDP2 (arXiv 2304.11277), as a measuring stick for ZeRO; training never uses it.

Blocks are sharded and gathered one by one, in the dtype of the activations; gradients are reduced in fp32. The scan's
state parameters, which the model uses in fp32, are replicated. AdamW is torch's fused one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fusiontree.config import RunConfig
from fusiontree.data.batch import Batch
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.kernels import DTYPES
from fusiontree.model.documents import to_device
from fusiontree.model.mamba import STATE_PARAMETERS
from fusiontree.training.engine_setup import build_model
from fusiontree.training.norms import total_norm
from fusiontree.training.objective import Objective
from fusiontree.training.optimizer import parameter_groups
from fusiontree.training.schedule import set_learning_rates


class FsdpStep:
    """One optimizer update under FSDP2, with the interface of `TrainingStep.update`."""

    def __init__(self, config: RunConfig, world: World):
        self.config, self.world = config, world
        self.model: Any = build_model(config, world, {"zero_optimization": {"stage": 0}})
        self.objective = Objective(config, world.device)
        named = self.model.named_parameters()
        self.replicated = {parameter for name, parameter in named if name.rpartition(".")[2] in STATE_PARAMETERS}
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[config.precision], reduce_dtype=torch.float32)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=self.replicated)
        chosen = config.optimizer
        groups = [
            {**group, "params": [p for p in group["params"] if (p in self.replicated) == replicated]}
            for group in parameter_groups(self.model, chosen)
            for replicated in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, betas=(chosen.beta1, chosen.beta2), eps=chosen.eps, fused=True)
        self.peaks = [group["lr"] for group in groups]

    def update(self, batches: Sequence[Batch], step: int) -> float:
        """Run an update on this rank's batches, one per accumulation step; return the loss in nats per token."""
        device = self.world.device
        tokens = torch.tensor(float(sum(batch.real_tokens for batch in batches)), device=device)
        collectives.sum_over_ranks(tokens)
        loss = torch.zeros((), device=device)
        set_learning_rates(self.adam.param_groups, self.peaks, self.config.schedule, step)
        for number, batch in enumerate(batches):
            # the fastest way to accumulate: full gradients stay on each rank until the last backward pass reduces them
            self.model.set_requires_gradient_sync(number == len(batches) - 1)
            ids, labels, documents = to_device(batch, device)
            options = self.objective.options(ids, documents, step)
            total, parts = self.objective.combine(self.model(ids, documents, labels=labels, **options), step)
            (total * (self.world.size / tokens)).backward()  # FSDP2 averages over ranks
            loss += parts["loss"] / tokens
        self._clip()
        self.adam.step()
        self.adam.zero_grad()
        return float(collectives.sum_over_ranks(loss))

    def _clip(self) -> None:
        """Average the gradients of the replicated parameters, and clip all by their global norm."""
        copies = [parameter.grad for parameter in self.replicated if parameter.grad is not None]
        for gradient in copies:
            dist.all_reduce(gradient)
            gradient /= self.world.size
        parameters = self.model.parameters()
        shards = [p.grad.to_local() for p in parameters if p not in self.replicated and p.grad is not None]
        squares = collectives.sum_over_ranks(total_norm(shards).square())
        norm = (squares + total_norm(copies).square()).sqrt()
        if self.config.optimizer.grad_clip:
            torch._foreach_div_([*shards, *copies], (norm / self.config.optimizer.grad_clip).clamp(min=1.0))
