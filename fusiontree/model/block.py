"""The hybrid block: parallel Mamba and attention branches, a learned gate, an MLP. Axes: B rows, L tokens, H width."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .attention import AttentionBranch
from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .kernel_registry import Kernels
from .layers import Linear
from .mamba import MambaBranch
from .recompute import Recompute
from .time_encoding import time_encoding

Branch = Literal["mamba", "attention"]


class Fusion(nn.Module):
    """The learned fusion ``2·(g ⊙ m + (1 − g) ⊙ a)``. At initialization the gate g is one half: exactly m + a."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kind, self.kernels, self.eps = config.fusion, kernels, config.norm_eps
        H, rank = config.hidden_size, config.gate_rank
        outputs = 1 if self.kind == "token" else H
        if self.kind in ("channel", "token"):
            self.down = nn.Parameter(torch.empty(rank, 2 * H))
            self.up = nn.Parameter(torch.empty(outputs, rank))
        if self.kind != "sum":
            self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the gate's logits to zero, so the gate g is one half."""
        if self.kind in ("channel", "token"):
            nn.init.normal_(self.down, std=0.02, generator=generator)
            nn.init.zeros_(self.up)
        if self.kind != "sum":
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, m: Tensor, a: Tensor, real: Tensor | None, norm_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the fused branches to the residual stream, and compute the MLP's norm.

        Args:
            x: the residual stream, [B, L, H].
            m, a: the outputs of the Mamba and the attention branch, [B, L, H] each.
            real: bool [B, L], tokens that count in the gate's mean; None: the mean is not computed.
            norm_weight: [H].

        Returns:
            The new residual stream and its norm, [B, L, H] each, and the mean gate by channel, fp32 [H] or None.
        """
        gate = getattr(self, "down", None), getattr(self, "up", None), getattr(self, "bias", None)
        fused, normed, mean = self.kernels.pointwise.fuse(x, m, a, gate, real, norm_weight, self.eps)
        return fused, normed, None if mean is None else mean.expand(x.shape[-1])


class Context(NamedTuple):
    """Inputs that all blocks share in one forward pass."""

    documents: Documents
    rotary: tuple[Tensor, Tensor]  # cosines and sines, see `rotary_embedding`
    real: Tensor | None  # bool [B, L], tokens that count in the gate's mean; None: the mean is not computed
    cache: Cache | None
    recompute: Recompute


class SwiGLU(nn.Module):
    """Gated MLP, ``W_down(silu(W_gate·x) ⊙ W_up·x)`` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.gate_up = Linear(config.hidden_size, 2 * config.mlp_size)
        self.down = Linear(config.mlp_size, config.hidden_size, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output; shapes [..., H]."""
        return self.down(self.kernels.pointwise.swiglu(self.gate_up(x)))


class HybridBlock(nn.Module):
    """``x ← x + fusion(mamba(h), attention(h)), h = norm(x)``, then ``x ← x + MLP(norm(x))``.

    A pruned layer has one branch and no fusion.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.kind, self.kernels, self.eps = config.kind_at(layer), kernels, config.norm_eps
        # the block owns the weights of its norms: each norm is fused with neighbouring pointwise operations
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden_size))
        has_mamba, has_attention = config.has("mamba", layer), config.has("attention", layer)
        self.srte = time_encoding(config) if has_mamba and not config.srte_shared else None
        self.mamba = MambaBranch(config, layer, kernels) if has_mamba else None
        self.attention = AttentionBranch(config, layer, kernels) if has_attention else None
        self.fusion = Fusion(config, kernels) if has_mamba and has_attention else None
        self.mlp = SwiGLU(config, kernels)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the norm weights to one."""
        nn.init.ones_(self.norm)
        nn.init.ones_(self.mlp_norm)

    def forward(
        self, x: Tensor, time: Tensor | None, context: Context, dropped: Branch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the block to the residual stream.

        Args:
            x: the residual stream, [B, L, H].
            time: the time encoding, [B, L, H], if all blocks share one.
            context: inputs that the blocks share.
            dropped: the branch whose output is zeroed in this forward pass, if any.

        Returns:
            The new residual stream, [B, L, H], and the mean gate by channel over the real tokens, fp32 [H] or None.
        """
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of its tensors
            return self._forward(x, time, context, dropped)

    def _forward(
        self, x: Tensor, time: Tensor | None, context: Context, dropped: Branch | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.srte is not None:
            time = self.srte(context.documents.position_ids, x.dtype)
        h, timed = self.kernels.pointwise.norm_with_time(x, time, self.norm, self.eps)
        m: Any = None
        a: Any = None
        recompute = context.recompute
        if self.mamba is not None:
            m = recompute.branch("mamba", self.mamba, timed, context.documents, context.cache)
        if self.attention is not None:
            a = recompute.branch("attention", self.attention, h, context.rotary, context.documents, context.cache)
        if self.fusion is None:
            x, h = self.kernels.pointwise.add_norm(x, a if m is None else m, self.mlp_norm, self.eps)
            gate = None if context.real is None else x.new_full(x.shape[-1:], float(a is None), dtype=torch.float32)
            return x + self.mlp(h), gate
        if dropped is not None:
            m, a = (m * 0, a) if dropped == "mamba" else (m, a * 0)
        x, h, gate = self.fusion(x, m, a, context.real, self.mlp_norm)
        return x + self.mlp(h), gate
