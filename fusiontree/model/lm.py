"""The language model. Axes: B rows, L tokens, H width, V vocabulary."""

import math
import random
from collections.abc import Callable, Iterator
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
    """What a forward gives; None where it was not asked for."""

    loss_sum: Tensor | None  # (), fp32: nats summed over the labelled tokens, z_sum included
    logits: Tensor | None  # [B, kept L, V], fp32
    gates: Tensor | None  # [layers, H], fp32: mean gate by channel over the labelled tokens; 1 is all Mamba
    token_losses: Tensor | None = None  # [B, L], fp32: nats, 0 where nothing is labelled; without gradient
    z_sum: Tensor | None = None  # (), fp32, without a gradient: what the z-loss is of loss_sum
    distill_sum: Tensor | None = None  # (), fp32: nats from the teacher, summed over the labelled tokens


class HybridLM(nn.Module):
    """A stack of hybrid blocks between an embedding and a head.

    Parameters are fp32 unless converted; activations are `compute_dtype`, or the embedding's dtype where that is None.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | None = None,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = KEEP,
    ):
        super().__init__()
        self.config = config
        self.kernels = kernels or reference_kernels()
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        std = 0.5 / math.sqrt(config.hidden_size)  # so that logits start with a deviation of one half
        self.embedding = Embedding(config.vocab_size, config.hidden_size, std)
        self.srte = time_encoding(config) if config.srte_shared else None
        self.blocks = nn.ModuleList(HybridBlock(config, i, self.kernels) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, std)

    @property
    def head_weight(self) -> Tensor:
        """[V, H], the embedding's own when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.compute_dtype or self.embedding.weight.dtype

    def use_kernels(self, kernels: Kernels) -> None:
        """Compute with `kernels` from now on."""
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]

    def new_cache(self, rows: int) -> Cache:
        """An empty cache for `rows` rows."""
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
        """One forward over packed rows, or over the next tokens of cached ones.

        Args:
            input_ids: int64 [B, L].
            documents: where documents lie; None when each row is one document (with a cache: goes on with it).
            labels: int64 [B, L], already shifted, `IGNORE` where there is none. Given, the loss is made and no logits.
            cache: what came before; continued in place.
            keep_logits: make logits of the last so many tokens only, or of those at these places, int64; None for all.
            branch_drops: by layer, the branch to zero in this training step.
            by_token: with labels, give the token losses and nothing else.
            z_loss: weight of the z-loss, see `reference.linear_cross_entropy`.
            teacher: what to be near, see `reference.linear_distillation`.
        """
        x, gates = self.hidden(input_ids, documents, labels, cache, branch_drops)
        if labels is None:
            if keep_logits is not None:
                x = x[:, -keep_logits:] if isinstance(keep_logits, int) else x[:, keep_logits]
            # by a module's own call: who keeps its weights elsewhere fetches them before it
            logits = self.embedding(x, as_head=True) if self.head is None else self.head(x)
            return Output(None, logits.float(), None)
        head = x.flatten(0, 1), self.head_weight
        if by_token:
            return Output(None, None, None, token_losses(*head, labels.flatten()).view_as(labels))
        loss_sum, z_sum = self.kernels.loss(*head, labels.flatten(), z_loss)
        far = None if teacher is None else linear_distillation(*head, teacher, (labels != IGNORE).flatten())
        return Output(loss_sum, None, gates, None, z_sum, far)

    def hidden(
        self,
        input_ids: Tensor,
        documents: Documents | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        branch_drops: list[Branch | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the head makes its logits of, [B, L, H], and with labels the mean gates; see `forward`."""
        if cache is not None:
            cache.reserve(cache.length + input_ids.shape[1])
            cache.whole = cache.whole and documents is None
        if documents is None:
            documents = self._continue(input_ids, cache)
        if cache is not None:
            cache.begin(documents)
        rotary = rotary_embedding(documents.position_ids, self.config.head_dim, self.config.rope_base)
        # computed again, a block would meet the cache behind its own tokens
        recompute = self.recompute if cache is None else KEEP
        context = Context(documents, rotary, None if labels is None else labels != IGNORE, cache, recompute)
        time = None if self.srte is None else self.srte(documents.position_ids, self.activation_dtype)
        x = self.embedding(input_ids).to(self.activation_dtype)
        gates: list[Any] = []  # nothing where nothing is labelled
        drops = branch_drops or [None] * len(self.blocks)
        for layer, (block, dropped) in enumerate(zip(self.blocks, drops, strict=True)):
            x, gate = recompute.block(layer, block, x, time, context, dropped)
            gates.append(gate)
        if cache is not None:
            cache.end(documents)
        return self.norm(x), None if labels is None else torch.stack(gates)

    def _continue(self, input_ids: Tensor, cache: Cache | None) -> Documents:
        """Documents of new tokens that go on with the cached document of their row."""
        B, L = input_ids.shape
        if cache is None or cache.length == 0:
            return Documents.whole_rows(B, L, input_ids.device)
        if L == 1:
            return cache.next_token()
        new = cache.last_document[:, None].expand(B, L)
        return Documents.from_seq_idx(torch.cat([cache.seq_idx[:, : cache.length], new], 1)).last(L)


Initializer = Callable[
    [str, Any], None
]  # makes the own parameters of a module, given with its name; before, they are meta


def materialize(model: HybridLM, give: Initializer, device: torch.device) -> Iterator[nn.Module]:
    """Bring a model made on the meta device to `device`, with the weights that `give` gives (`drawn`, for one).

    Yields:
        Each module as soon as its own parameters are there: who cuts them up never holds the whole model.
    """
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        give(name, module)
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.detach().to(device)))
        yield module


def seeded_init(seed: int) -> Initializer:
    """Initial weights: a function of `seed` and the modules' names alone, drawn on the host for every device."""

    def give(name: str, module: Any) -> None:
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters(torch.Generator().manual_seed(random.Random(f"weights {seed} {name}").getrandbits(63)))

    return give


def branch_drops(config: ModelConfig, seed: int, step: int) -> list[Branch | None]:
    """By layer, the branch that `step` trains without, if any: a pure function, the same on every rank and resume."""
    drops: list[Branch | None] = []
    for layer in range(config.num_layers):
        draw = random.Random(f"branch drop {seed} {step} {layer}")
        hit = draw.random() < config.branch_drop and config.kind_at(layer) == "hybrid"
        drops.append(draw.choice(("mamba", "attention")) if hit else None)
    return drops
