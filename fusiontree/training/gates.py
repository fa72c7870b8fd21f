"""What the gates settle on: the statistics that reports show and pruning decides by."""

import torch
from torch import Tensor

DECAY = 0.99  # weight of the past in the running mean: it remembers about a hundred updates


class GateStatistics:
    """Running mean of every layer's gate by channel, fp32 [layers, H]; 1 is all Mamba, 0 all attention.

    It lives on the device: updating it never waits for the host.
    """

    def __init__(self, layers: int, channels: int, device: torch.device):
        self.mean = torch.full((layers, channels), 0.5, device=device)  # where every gate starts

    def update(self, gates: Tensor) -> None:
        """Take in one update's mean gate, [layers, H]."""
        self.mean.lerp_(gates.detach(), 1 - DECAY)
