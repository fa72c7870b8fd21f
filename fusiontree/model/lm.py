"""The language model. Axes: B rows, L tokens, H width, V vocabulary.

Notable features:

- parallel Mamba-2 (arXiv 2405.21060) and attention branches in each layer, with a norm and an output projection each
- learned gate per channel and token between the branches; at initialization the fusion is exactly their sum
- grouped-query attention (arXiv 2305.13245); some heads see their full document, the others a sliding window
- QK norm (arXiv 2010.04245) before RoPE (arXiv 2104.09864)
- SRTE: sinusoidal or learned time encoding, added to the Mamba branch's input only
- packed documents isolated to the last bit in scan, convolution, attention and positions
- pre-norm with RMSNorm (arXiv 1910.07467), SwiGLU MLP (arXiv 2002.05202), no bias in linear layers
- tied embedding and head by default
- chunked loss head that never materializes all logits; optional z-loss (arXiv 2204.02311) and distillation
- optional branch dropout: a layer trains some steps without one of its branches
- pruned layers: one branch only, or fewer global heads
- fp32 master weights with bf16 activations; the scan's parameters, decays and states stay fp32
- initialization on the meta device, one module at a time: ZeRO-3 never needs the full model in one memory
- decoding with a constant-size state and ring buffers, except for the global heads; CUDA-graph capture
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import rotary_embedding
from .block import Branch, Context, HybridBlock
from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .kernel_registry import Kernels, reference_kernels
from .layers import Embedding, Linear, RMSNorm
from .loss import IGNORE, Teacher, linear_distillation, token_losses
from .recompute import KEEP, Recompute
from .time_encoding import time_encoding


class Output(NamedTuple):
    """Results of a forward pass; None where not requested."""

    loss_sum: Tensor | None  # (), fp32: nats summed over the labelled tokens, including z_sum
    logits: Tensor | None  # [B, kept L, V], fp32
    gates: Tensor | None  # [layers, H], fp32: mean gate by channel over the labelled tokens; 1 is Mamba only
    token_losses: Tensor | None = None  # [B, L], fp32: nats, 0 without a label; detached
    z_sum: Tensor | None = None  # (), fp32: the z-loss in loss_sum; detached
    distill_sum: Tensor | None = None  # (), fp32: KL divergence from the teacher, nats summed over the labelled tokens


class Backbone(nn.Module):
    """A stack of hybrid blocks between an embedding and a norm: the model without its head.

    Parameters are fp32 unless converted. Activations are in `compute_dtype`; None means the embedding's dtype. A
    subclass calls `build` in its constructor.
    """

    def build(
        self,
        config: ModelConfig,
        kernels: Kernels,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = KEEP,
    ) -> None:
        """Create the modules."""
        self.kernels, self.compute_dtype, self.recompute = kernels, compute_dtype, recompute
        self.rotary = partial(rotary_embedding, head_dim=config.head_dim, base=config.rope_base)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.embedding_std)
        self.srte = time_encoding(config) if config.srte_shared else None
        self.blocks = nn.ModuleList(HybridBlock(config, i, kernels) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.compute_dtype or self.embedding.weight.dtype

    def replace_kernels(self, kernels: Kernels) -> None:
        """Replace the kernels of all modules."""
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]

    def hidden(
        self,
        tokens: Tensor,
        documents: Documents | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        branch_drops: list[Branch | None] | None = None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input of the head, [B, L, H], and with labels the mean gates.

        Args:
            tokens: int64 [B, L], or their embeddings [B, L, H].
            states: the input of each block, [B, L, H], is appended to it.
            documents, labels, cache, branch_drops: as in `HybridLM.forward`.
        """
        B, L = tokens.shape[:2]
        if cache is not None:
            cache.reserve(cache.length + L)
            cache.one_document = cache.one_document and documents is None
        if documents is None:
            documents = self._continue(B, L, tokens.device, cache)
        if cache is not None:
            cache.begin(documents)
        rotary = self.rotary(documents.position_ids)
        # no recomputation with a cache: the second run of a block would find its own tokens in the cache
        recompute = self.recompute if cache is None else KEEP
        context = Context(documents, rotary, None if labels is None else labels != IGNORE, cache, recompute)
        time = None if self.srte is None else self.srte(documents.position_ids, self.activation_dtype)
        x = (tokens if tokens.is_floating_point() else self.embedding(tokens)).to(self.activation_dtype)
        gates: list[Any] = []  # entries are None without labels
        drops = branch_drops or [None] * len(self.blocks)
        for layer, (block, dropped) in enumerate(zip(self.blocks, drops, strict=True)):
            if states is not None:
                states.append(x)
            x, gate = recompute.block(layer, block, x, time, context, dropped)
            gates.append(gate)
        if cache is not None:
            cache.end(documents)
        return self.norm(x), None if labels is None else torch.stack(gates)

    def _continue(self, B: int, L: int, device: torch.device, cache: Cache | None) -> Documents:
        """Return the documents of new tokens that continue the last document of their row."""
        if cache is None or cache.length == 0:
            return Documents.one_per_row(B, L, device)
        if L == 1:
            return cache.next_token()
        new = cache.last_document[:, None].expand(B, L)
        return Documents.from_seq_idx(torch.cat([cache.seq_idx[:, : cache.length], new], 1)).last(L)


class HybridLM(Backbone):
    """The backbone and its head, with the losses of training."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | None = None,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = KEEP,
    ):
        super().__init__()
        self.config = config
        self.build(config, kernels or reference_kernels(), compute_dtype, recompute)
        std = config.embedding_std
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, std)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, [V, H]; that of the embedding if tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, rows: int) -> Cache:
        """Return an empty cache for `rows` rows."""
        return Cache(self.config, rows, self.activation_dtype, self.embedding.weight.device)

    def forward(
        self,
        input_ids: Tensor,
        documents: Documents | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        keep_logits: int | Tensor | None = None,
        branch_drops: list[Branch | None] | None = None,
        by_token: bool = False,
        z_loss: float = 0.0,
        teacher: Teacher | None = None,
    ) -> Output:
        """Run the model over packed rows, or over the next tokens of cached rows.

        Args:
            input_ids: int64 [B, L].
            documents: of the tokens; None: each row is one document, or continues the last one of its cached row.
            labels: int64 [B, L], already shifted, `IGNORE` where there is no label. With labels, the loss is computed
                and no logits.
            cache: of the earlier tokens; continued in place.
            keep_logits: compute logits of the last n tokens, or of the tokens at these int64 indices; None: of all.
            branch_drops: by layer, the branch to zero in this training step.
            by_token: with labels, return the token losses and nothing else.
            z_loss: weight of the z-loss, see `loss.linear_cross_entropy`.
            teacher: for distillation, see `loss.linear_distillation`.
        """
        x, gates = self.hidden(input_ids, documents, labels, cache, branch_drops)
        if labels is None:
            if keep_logits is not None:
                x = x[:, -keep_logits:] if isinstance(keep_logits, int) else x[:, keep_logits]
            # a module's call, not its weight: hooks of ZeRO-3 and of offloading fetch the weight at the call
            logits = self.embedding(x, as_head=True) if self.head is None else self.head(x)
            return Output(None, logits.float(), None)
        head = x.flatten(0, 1), self.head_weight
        if by_token:
            return Output(None, None, None, token_losses(*head, labels.flatten()).view_as(labels))
        loss_sum, z_sum = self.kernels.loss(*head, labels.flatten(), z_loss)
        distill_sum = None if teacher is None else linear_distillation(*head, teacher, (labels != IGNORE).flatten())
        return Output(loss_sum, None, gates, None, z_sum, distill_sum)


# (module name, module) → None: replaces the module's own meta parameters, not those of its children, by real ones
Initializer = Callable[[str, Any], None]


def materialize(model: HybridLM, initializer: Initializer, device: torch.device) -> Iterator[nn.Module]:
    """Initialize a model that was built on the meta device, module by module, on `device`.

    Yields:
        Each module that has parameters, as soon as these are on `device`. A caller that partitions them before the next
        module needs memory for one module only.
    """
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        initializer(name, module)
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.detach().to(device)))
        yield module


def seeded_init(seed: int) -> Initializer:
    """Return an initializer whose weights depend on `seed` and the module names only; drawn on the CPU."""

    def initialize(name: str, module: Any) -> None:
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters(torch.Generator().manual_seed(random.Random(f"weights {seed} {name}").getrandbits(63)))

    return initialize


def branch_drops(config: ModelConfig, seed: int, step: int) -> list[Branch | None]:
    """Return, by layer, the branch dropped in `step`, if any: a pure function, equal on all ranks and on resume."""
    drops: list[Branch | None] = []
    for layer in range(config.num_layers):
        draw = random.Random(f"branch drop {seed} {step} {layer}")
        hit = draw.random() < config.branch_drop and config.kind_at(layer) == "hybrid"
        drops.append(draw.choice(("mamba", "attention")) if hit else None)
    return drops
