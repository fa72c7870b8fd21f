"""One block: two branches side by side, fused by a learned gate, then an MLP. Axes: B rows, L tokens, H width."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionBranch
from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .layers import Linear, RMSNorm, SwiGLU
from .ops import Kernels
from .srte import time_encoding
from .ssm import MambaBranch

Branch = Literal["mamba", "attention"]


class Fusion(nn.Module):
    """The gate g in ``2·(g ⊙ m + (1 − g) ⊙ a)``: one half everywhere at the start, so exactly m + a."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.fusion
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

    def forward(self, m: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Branch outputs, [B, L, H] each, to their fusion [B, L, H] and the gate, [B, L, H] or [B, L, 1]."""
        if self.kind == "sum":
            return m + a, torch.full_like(m[..., :1], 0.5)
        logits = self.bias.to(m.dtype)
        if self.kind != "static":
            logits = self.up(F.silu(self.down(torch.cat([m, a], -1)))) + logits
        g = torch.sigmoid(logits).expand(*m.shape[:-1], -1)
        return 2 * (a + g * (m - a)), g


class Context(NamedTuple):
    """What every block of one forward shares."""

    documents: Documents
    rotary: tuple[Tensor, Tensor]  # of `rotary_embedding`
    real: Tensor | None  # bool [B, L], tokens that count in the gate's statistics; None: all
    cache: Cache | None


class HybridBlock(nn.Module):
    """x ← x + fusion(mamba, attention)(norm x); x ← x + MLP(norm x)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.srte = None if config.srte_shared else time_encoding(config)
        self.mamba = MambaBranch(config, layer, kernels)
        self.attention = AttentionBranch(config, layer, kernels)
        self.fusion = Fusion(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(
        self, x: Tensor, time: Tensor | None, context: Context, dropped: Branch | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, L, H] to [B, L, H], and the gate's mean over the real tokens by channel, fp32 [H].

        Args:
            x: the residual stream.
            time: [B, L, H], the time encoding, if all blocks share one.
            context: what the blocks share.
            dropped: the branch whose output is zero in this forward, if any.
        """
        h = self.norm(x)
        if self.srte is not None:
            time = self.srte(context.documents.position_ids, h.dtype)
        m = self.mamba(h if time is None else h + time, context.documents, context.cache)
        a = self.attention(h, context.rotary, context.documents, context.cache)
        if dropped is not None:
            m, a = (m * 0, a) if dropped == "mamba" else (m, a * 0)
        fused, gate = self.fusion(m, a)
        x = x + fused
        x = x + self.mlp(self.mlp_norm(x))
        return x, _gate_mean(gate, context.real).expand(x.shape[-1])


def _gate_mean(gate: Tensor, real: Tensor | None) -> Tensor:
    """Mean of [B, L, channels] over the real tokens, fp32 [channels]; one half when none is real."""
    if real is None:
        return gate.float().mean((0, 1))
    weight = real.float()
    count = weight.sum()
    mean = torch.einsum("blh,bl->h", gate.float(), weight) / count.clamp(min=1)
    return torch.where(count > 0, mean, 0.5)
