"""The training objective: cross-entropy, z-loss, penalties on the gates and distillation."""

from typing import Any

import torch
from torch import Tensor

from fusiontree.config import LossConfig, RunConfig
from fusiontree.inference.loading import check_positions, load_export
from fusiontree.kernels import DTYPES
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM, Output
from fusiontree.model.loss import Teacher
from fusiontree.training.schedule import value_at


def gate_penalty(mean: Tensor, losses: LossConfig, step: int) -> tuple[Tensor, Tensor]:
    """Return the penalty on the running mean of the gates, (), and its slope at that mean, [layers, H].

    With M the mean by layer and channel, the penalty is ``balance · mean over layers of max(0, |mean(M) − target| −
    band)`` plus ``entropy · mean of −M ln M − (1 − M) ln(1 − M)``.

    The penalty depends on all tokens, of which a rank or an accumulation step sees only a part. So an update adds the
    slope times its own mean gates to the objective: a sum over tokens, unchanged by any split of the batch. It moves
    the gates like the gradient of the penalty itself.

    Args:
        mean: [layers, H]; 1 is all Mamba.
        losses: the weights, target and band.
        step: selects the weights.
    """
    balance, entropy = value_at(losses.gate_balance, step), value_at(losses.gate_entropy, step)
    layers = mean.mean(1, keepdim=True)
    away = layers - losses.gate_target
    outside = away.abs() - losses.gate_band
    m = mean.clamp(1e-6, 1 - 1e-6)
    penalty = balance * outside.clamp(min=0).mean() - entropy * (m * m.log() + (1 - m) * (1 - m).log()).mean()
    slope = balance * away.sign() * (outside > 0) - entropy * (m.log() - (1 - m).log())
    return penalty, slope / mean.numel()


class Objective:
    """The objective without the gate penalty: cross-entropy, z-loss and the divergence from a teacher.

    The teacher is frozen and replicated on every rank, in the precision of the run's activations.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        """Load the teacher, if there is one; raises as `load_export` does."""
        self.losses, self.distill = config.losses, config.distill
        self.teacher: HybridLM | None = None
        if config.distill.teacher is not None:
            self.teacher, _ = load_export(config.distill.teacher, device, DTYPES[config.precision])
            self.teacher.requires_grad_(False)
            check_positions(self.teacher.config, config.data.seq_len)

    def options(self, input_ids: Tensor, documents: Documents, step: int) -> dict[str, Any]:
        """Return the arguments of `HybridLM.forward` that select the terms of update `step` on tokens [B, L]."""
        options: dict[str, Any] = {"z_loss": self.losses.z_loss}
        if self.teacher is not None and value_at(self.distill.weight, step):
            with torch.no_grad():
                hidden, _ = self.teacher.hidden(input_ids, documents)
            temperature, top_k = self.distill.temperature, self.distill.top_k
            options["teacher"] = Teacher(hidden.flatten(0, 1), self.teacher.head_weight, temperature, top_k)
        return options

    def combine(self, output: Output, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective, (), and its terms by name for the metrics, all summed over the output's tokens."""
        assert output.loss_sum is not None
        assert output.z_sum is not None
        total, parts = output.loss_sum, {"loss": output.loss_sum - output.z_sum}
        if self.losses.z_loss:
            parts["z_loss"] = output.z_sum
        if output.distill_sum is not None:
            total = total + value_at(self.distill.weight, step) * output.distill_sum
            parts["distill_loss"] = output.distill_sum
        return total, {name: part.detach() for name, part in parts.items()}
