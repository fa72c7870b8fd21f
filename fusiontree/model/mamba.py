"""The Mamba branch. Axes: B rows, L tokens, H SSM heads, P SSM head size, G groups, S state size."""

import math

import torch
from torch import Tensor, nn

from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .kernel_registry import Kernels
from .layers import Linear
from .split import split_channels

STATE_PARAMETERS = ("A_log", "D", "dt_bias")  # stored and used in fp32, whatever the dtype of the model


class MambaBranch(nn.Module):
    """Mamba-2 (arXiv 2405.21060) with its gated norm and output projection."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels
        self.in_proj = Linear(config.hidden_size, config.ssm_projection_size)
        self.conv_weight = nn.Parameter(torch.empty(config.conv_size, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(config.conv_size))
        self.A_log = nn.Parameter(torch.empty(config.ssm_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(config.ssm_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(config.ssm_heads, dtype=torch.float32))
        self.norm = nn.Parameter(torch.empty(config.ssm_size))
        self.out_proj = Linear(config.ssm_size, config.hidden_size, config.residual_std)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize decay rates in [1, 16] and time steps log-uniform in [0.001, 0.1], as Mamba-2's authors do."""
        bound = 1 / math.sqrt(self.config.conv_kernel)
        nn.init.uniform_(self.conv_weight, -bound, bound, generator)
        nn.init.uniform_(self.conv_bias, -bound, bound, generator)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm)
        with torch.no_grad():
            self.A_log.uniform_(1, 16, generator=generator).log_()
            dt = self.dt_bias.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_().clamp_(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def forward(self, x: Tensor, documents: Documents, cache: Cache | None) -> Tensor:
        """Return the branch's output; shapes [B, L, hidden_size]. `cache`, if any, is continued in place."""
        c = self.config
        z, xBC, dt = split_channels(self.in_proj(x), [(c.ssm_size,), (c.conv_size,), (c.ssm_heads,)])
        if cache is not None and x.shape[1] == 1:
            y = self._step(xBC, dt, documents, cache)
        else:
            y = self._scan(self._convolve(xBC, documents, cache), dt, documents, cache)
        return self.out_proj(self.kernels.pointwise.gated_norm(y.flatten(-2), z, self.norm, c.norm_eps))

    def _convolve(self, xBC: Tensor, documents: Documents, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.kernels.convolution(xBC, self.conv_weight, self.conv_bias, documents.seq_idx)
        joined = cache.layer(self.layer).append_conv(xBC)
        y = self.kernels.convolution(joined, self.conv_weight, self.conv_bias, cache.conv_documents(documents))
        return y[:, -xBC.shape[1] :]

    def _scan(self, xBC: Tensor, dt: Tensor, documents: Documents, cache: Cache | None) -> Tensor:
        c = self.config
        groups = c.ssm_groups, c.ssm_state_size
        values, B_in, C_out = split_channels(xBC, [(c.ssm_heads, c.ssm_head_dim), groups, groups])
        y, state = self.kernels.scan(
            values,
            self.kernels.pointwise.time_step(dt, self.dt_bias),
            -torch.exp(self.A_log),
            B_in,
            C_out,
            self.D,
            documents.seq_idx,
            initial_state=None if cache is None else cache.layer(self.layer).state,
            initial_seq=None if cache is None else cache.last_document,
            chunk_size=c.chunk_size,
        )
        if cache is not None:
            cache.layer(self.layer).state.copy_(state.detach())
        return y

    def _step(self, xBC: Tensor, dt: Tensor, documents: Documents, cache: Cache) -> Tensor:
        layer = cache.layer(self.layer)
        seen = cache.continues(documents)
        scan = self.A_log, self.D, self.dt_bias
        conv = self.conv_weight, self.conv_bias
        groups = self.config.ssm_groups
        return self.kernels.pointwise.mamba_step(xBC, dt, layer.conv_tail, seen, layer.state, conv, scan, groups)
