"""Running statistics of the gates, for reports and pruning."""

import torch
from torch import Tensor

from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World

DECAY = 0.99  # weight of the past in the running mean: a horizon of about a hundred updates


class GateStatistics:
    """Running mean of each layer's gate by channel, over the real tokens of all ranks; 1 is all Mamba.

    Each rank keeps its share, fp32 [layers, H], on its device: summed over the ranks, the shares are the mean. So an
    update waits neither for the host nor for other ranks.
    """

    def __init__(self, layers: int, channels: int, world: World):
        self.world = world
        self.restore(torch.full((layers, channels), 0.5))  # every gate's initial value

    def update(self, share: Tensor) -> None:
        """Add an update's mean gates to the running mean; `share`: this rank's share, [layers, H]."""
        self.share.lerp_(share, 1 - DECAY)

    def mean(self) -> Tensor:
        """Return the mean over all ranks, [layers, H]. Collective.

        It also sets every rank's share to an equal part of the mean, as a resume does: otherwise the shares of a run
        after a save would round differently from those of a run resumed from that checkpoint.
        """
        mean = collectives.sum_over_ranks(self.share)
        self.restore(mean)
        return mean

    def restore(self, mean: Tensor) -> None:
        """Set the running mean to `mean`, [layers, H]."""
        self.share = mean.to(self.world.device) / self.world.size
