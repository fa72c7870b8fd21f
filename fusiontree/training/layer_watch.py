"""Figures of each layer in one update: gates, RMS of each branch's output, gradient norm.

Only watched updates run the hooks and wait for the device.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusiontree.data.batch import IGNORE
from fusiontree.distributed import collectives
from fusiontree.distributed.collectives import World
from fusiontree.training.metrics import BINS, LayerFigures
from fusiontree.training.norms import total_norm
from fusiontree.zero.engine import named_gradient_shards

_BRANCHES = ("mamba", "attention")


class LayerWatch:
    """Context manager that records one update. Collective: all ranks enter it, update with it and read `figures`."""

    def __init__(self, engine: Any, world: World):
        self.engine, self.world = engine, world
        layers = len(engine.module.blocks)
        self._squares = torch.zeros(layers, len(_BRANCHES), device=world.device)  # summed over the real tokens
        self._tokens = torch.zeros(layers, len(_BRANCHES), device=world.device)
        # squared gradient norms; the last element is of the parameters outside the layers
        self._gradients = torch.zeros(layers + 1, device=world.device)
        self._real: Tensor | None = None  # bool [B, L]: tokens with a label
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "LayerWatch":
        model = self.engine.module
        self._handles = [model.register_forward_pre_hook(self._record_batch, with_kwargs=True)]
        for layer, block in enumerate(model.blocks):
            for branch, name in enumerate(_BRANCHES):
                module = getattr(block, name)
                if module is not None:  # None: pruned
                    hook = partial(self._record_output, layer, branch)
                    self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record_batch(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._real = kwargs["labels"] != IGNORE

    def _record_output(self, layer: int, branch: int, module: nn.Module, args: Any, output: Tensor) -> None:
        """Add a branch's output, [B, L, H].

        With recomputation the hook runs twice per batch, which counts each output and its tokens twice: the mean is
        the same.
        """
        assert self._real is not None
        norms = torch.linalg.vector_norm(output.detach(), dim=-1, dtype=torch.float32)
        self._squares[layer, branch] += (norms.square() * self._real).sum()
        self._tokens[layer, branch] += self._real.sum()

    def record_gradients(self) -> None:
        """Record the gradient norms; call it after the update's last backward pass, before the optimizer's step."""
        layers = len(self._gradients) - 1
        for name, gradient in named_gradient_shards(self.engine):
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else layers
            self._gradients[layer] += total_norm([gradient]).square()

    def figures(self, gates: Tensor) -> LayerFigures:
        """Return the figures over all ranks; `gates`: this rank's share of the update's mean gates, [layers, H]."""
        parts = (self._squares, self._tokens, self._gradients, gates)
        summed = collectives.sum_over_ranks(torch.cat([part.flatten() for part in parts])).cpu().numpy()
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        flat = zip(np.split(summed, ends), parts, strict=True)
        squares, tokens, gradients, channels = (values.reshape(part.shape) for values, part in flat)
        rms = np.sqrt(squares / (np.maximum(tokens, 1) * gates.shape[1]))
        norms = np.sqrt(gradients)
        return LayerFigures(
            gate_mean=_rounded(channels.mean(1)),
            gate_std=_rounded(channels.std(1)),
            gate_histogram=[np.histogram(layer, BINS, (0.0, 1.0))[0].tolist() for layer in channels],
            mamba_rms=_rounded(rms[:, 0]),
            attention_rms=_rounded(rms[:, 1]),
            grad_norm=_rounded(norms[:-1]),
            other_grad_norm=_rounded(norms[-1:]),
        )


def _rounded(values: np.ndarray) -> list[float]:
    """Return `values` with six significant digits: further ones are noise and double the file's size."""
    return [float(f"{value:.6g}") for value in values]
