"""One block: two branches side by side, fused by a learned gate, then an MLP. Axes: B rows, L tokens, H width."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionBranch
from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .layers import Linear, RMSNorm
from .ops import Kernels
from .srte import time_encoding
from .ssm import MambaBranch

Branch = Literal["mamba", "attention"]


class Fusion(nn.Module):
    """The gate g in ``2·(g ⊙ m + (1 − g) ⊙ a)``: one half everywhere at the start, so exactly m + a."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kind, self.pointwise = config.fusion, kernels.pointwise
        H, rank = config.hidden_size, config.gate_rank
        outputs = 1 if self.kind == "token" else H
        if self.kind in ("channel", "token"):
            self.down = Linear(2 * H, rank)
            self.up = Linear(rank, outputs)
        if self.kind != "sum":
            self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero what leads to the gate's logits: g is one half."""
        if self.kind in ("channel", "token"):
            nn.init.zeros_(self.up.weight)
        if self.kind != "sum":
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, m: Tensor, a: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream with the branches' fusion added, [B, L, H], and the gate's mean over the real tokens.

        Args:
            x, m, a: the stream and the branches' outputs, [B, L, H] each.
            real: bool [B, L]; None: no mean is made.
        """
        logits = None
        if self.kind in ("channel", "token"):
            on_m, on_a = self.down.weight.to(m.dtype).chunk(2, -1)
            logits = self.up(F.silu(F.linear(m, on_m) + F.linear(a, on_a)))
        bias = None if self.kind == "sum" else self.bias
        fused, mean = self.pointwise.fuse(x, m, a, logits, bias, real)
        return fused, None if mean is None else mean.expand(x.shape[-1])


class Context(NamedTuple):
    """What every block of one forward shares."""

    documents: Documents
    rotary: tuple[Tensor, Tensor]  # of `rotary_embedding`
    real: Tensor | None  # bool [B, L], tokens that count in the gate's statistics; None: none are kept
    cache: Cache | None


class SwiGLU(nn.Module):
    """Gated MLP, ``W_down(silu(W_gate·x) ⊙ W_up·x)`` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.pointwise = kernels.pointwise
        self.gate_up = Linear(config.hidden_size, 2 * config.mlp_size)
        self.down = Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down(self.pointwise.swiglu(self.gate_up(x)))


class HybridBlock(nn.Module):
    """x ← x + fusion(mamba, attention)(norm x); x ← x + MLP(norm x)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.srte = None if config.srte_shared else time_encoding(config)
        self.mamba = MambaBranch(config, layer, kernels)
        self.attention = AttentionBranch(config, layer, kernels)
        self.fusion = Fusion(config, kernels)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config, kernels)

    def forward(
        self, x: Tensor, time: Tensor | None, context: Context, dropped: Branch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, H] to [B, L, H], and the gate's mean over the real tokens by channel, fp32 [H].

        Args:
            x: the residual stream.
            time: [B, L, H], the time encoding, if all blocks share one.
            context: what the blocks share.
            dropped: the branch whose output is zero in this forward, if any.
        """
        if self.srte is not None:
            time = self.srte(context.documents.position_ids, x.dtype)
        pointwise = self.kernels.pointwise
        h, timed = pointwise.norm_with_time(x, time, self.norm.weight, self.norm.eps)
        m = self.mamba(timed, context.documents, context.cache)
        a = self.attention(h, context.rotary, context.documents, context.cache)
        if dropped is not None:
            m, a = (m * 0, a) if dropped == "mamba" else (m, a * 0)
        x, gate = self.fusion(x, m, a, context.real)
        return x + self.mlp(pointwise.norm(x, self.mlp_norm.weight, self.mlp_norm.eps)), gate
