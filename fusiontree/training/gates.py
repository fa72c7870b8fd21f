"""What the gates settle on: the statistics that reports show and pruning decides by."""

import torch
from torch import Tensor

from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World

DECAY = 0.99  # weight of the past in the running mean: it remembers about a hundred updates


class GateStatistics:
    """Running mean of every layer's gate by channel, over the real tokens of all ranks; 1 is all Mamba.

    Each rank keeps its share, fp32 [layers, H] on the device; the shares add up to the mean. So updating waits neither
    for the host nor for other ranks.
    """

    def __init__(self, layers: int, channels: int, world: World):
        self.world = world
        self.restore(torch.full((layers, channels), 0.5))  # where every gate starts

    def update(self, share: Tensor) -> None:
        """Take in this rank's share of one update's mean gate, [layers, H]."""
        self.share.lerp_(share, 1 - DECAY)

    def mean(self) -> Tensor:
        """The mean over all ranks, [layers, H]; all call it together, and go on as a resumed run would."""
        mean = collectives.sum_over_ranks(self.share)
        self.restore(mean)
        return mean

    def restore(self, mean: Tensor) -> None:
        """Go on from `mean`, [layers, H]."""
        self.share = mean.to(self.world.device) / self.world.size
