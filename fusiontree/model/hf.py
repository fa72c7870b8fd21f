"""The model with the interfaces of Hugging Face transformers; the only file of the model that imports it.

Axes: B rows, L new tokens, P cached tokens, H width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .config import ModelConfig
from .documents import Documents
from .hf_inputs import FusionTreeCache, NewTokens, at, check_arguments, given_cache, right_align
from .kernel_registry import OPERATIONS, Kernels, reference_kernels, select
from .layers import Linear
from .lm import Backbone
from .loss import IGNORE
from .mamba import STATE_PARAMETERS
from .pointwise import Pointwise
from .recompute import KEEP, Recompute


class FusionTreeConfig(PretrainedConfig):
    """`ModelConfig`'s fields as a Hugging Face configuration, plus `kernels`: back-ends by operation.

    Keys of `kernels` are those of `kernel_registry.OPERATIONS`, e.g. ``{"attention": "reference"}``. Missing keys mean
    `auto`: the fastest back-end that can run on the model's device.
    """

    model_type = "fusiontree"
    attribute_map = {  # noqa: RUF012 - read as a class attribute by transformers
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "mlp_size",
        "max_position_embeddings": "max_positions",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - likewise

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("kernels", None)
        kwargs.setdefault("tie_word_embeddings", kwargs.pop("tie_embeddings", True))
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """Return the model's shape."""
        return ModelConfig.from_dict(vars(self))


class FusionTreePreTrainedModel(PreTrainedModel):
    """Loading, initialization and gradient checkpointing of all models of this file."""

    config: FusionTreeConfig
    config_class = FusionTreeConfig
    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    _is_stateful = True  # `generate` refuses assisted decoding, which takes tokens back
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012 - read as a class attribute by transformers
    # the cache moves its layers itself; a copy by accelerate would not be continued in place
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - likewise
    _keep_in_fp32_modules_strict = list(STATE_PARAMETERS)  # noqa: RUF012 - likewise

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the parameters of `module` that were not loaded, as training does."""
        own = dict(module.named_parameters(recurse=False))
        loaded = {name: p.clone() for name, p in own.items() if getattr(p, "_is_hf_initialized", False)}
        if type(module) is nn.Linear:
            nn.init.normal_(own["weight"], std=getattr(module, "std", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif own:
            module.reset_parameters()  # type: ignore[operator]
        for name, value in loaded.items():
            own[name].copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int | None = None
    ) -> None:
        recompute = Recompute(every_n_layers or 1, checkpoint=gradient_checkpointing_func) if enable else KEEP
        self.base_model.recompute = recompute

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass creates the cache


class FusionTreeModel(FusionTreePreTrainedModel, Backbone):
    """The model without its head, with the interface of `AutoModel`."""

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self._shape = config.model_config()
        self._kernels_for: tuple[str, torch.dtype, bool] | None = None  # choice of the current kernels
        self.build(self._shape, reference_kernels())  # the first call chooses, when the device is known
        for module in self.modules():
            if type(module) is Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment] # quantizers replace no subclass
        self.post_init()  # type: ignore[operator] # of PreTrainedModel

    def new_cache(self, rows: int, device: torch.device | str | None = None) -> FusionTreeCache:
        """Return an empty cache for `rows` rows; by default on the device of the embedding."""
        return FusionTreeCache(self._shape, rows, self.activation_dtype, device or self.embedding.weight.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: FusionTreeCache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden state, [B, L, H], the cache and, if requested, all hidden states.

        The output at a masked token is that of the last real token before it; before the first one it has no meaning.

        Args:
            input_ids: int64 [B, L]; with a cache, the new tokens only.
            attention_mask: [B, P + L], true or 1 where a token is real. Masked tokens are skipped.
            position_ids: int64 [B or 1, L], counting the tokens of each document of a packed row: 0 starts a document.
            past_key_values: the cache of an earlier call, continued in place. No gradient passes through it.
            inputs_embeds: [B, L, H], in place of `input_ids`.
            use_cache: return a cache; None: as the configuration says, but not in training or with recomputation.
            output_hidden_states: return the inputs of all blocks and the last hidden state.
            cache: new name of `past_key_values`, from transformers 5.24.
            others: arguments of other models, see `check_arguments`.

        Raises:
            TypeError: an argument is not supported.
            ValueError: shapes do not fit, or a document is longer than SRTE's learned table.
        """
        check_arguments(
            {"output_attentions": self.config.output_attentions or None, **others}, position_ids is not None
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        self._prepare(tokens.device.type)
        cache = given_cache(past_key_values, cache)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and self.recompute.every == 0
        if cache is None and use_cache:
            cache = self.new_cache(len(tokens), tokens.device)
        new = NewTokens.read(tokens, attention_mask, position_ids, cache)
        all_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = self._states(tokens, new, cache, all_states)
        if cache is not None:
            cache.record(new.real, states[-1])
        # positional, because the name of the cache depends on the version
        return BaseModelOutputWithPast(states[-1], cache, tuple(states) if all_states else None)

    def _prepare(self, device_type: str) -> None:
        """Choose the precision of the activations and the kernels."""
        mixed = torch.is_autocast_enabled(device_type)
        self.compute_dtype = torch.get_autocast_dtype(device_type) if mixed else None
        key = device_type, self.activation_dtype, mixed
        if key != self._kernels_for:
            kernels = select(self.config.kernels, device_type, self._shape, self.activation_dtype)
            self.replace_kernels(_without_autocast(kernels, device_type) if mixed else kernels)
            self._kernels_for = key
            self._unpack_4bit()

    def _unpack_4bit(self) -> None:
        """Turn off the 4-bit packing of bitsandbytes for CPUs where it fails: at widths not in blocks of 32 × 64."""
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu") and isinstance(module, nn.Linear):
                packs = module.out_features % 32 == 0 and module.in_features % 64 == 0
                module.support_avx512bf16_for_cpu &= packs  # type: ignore[operator]

    def _states(self, tokens: Tensor, new: NewTokens, cache: FusionTreeCache | None, all_states: bool) -> list[Tensor]:
        """Return the last hidden state, [B, L, H], after the inputs of all blocks if `all_states`."""
        if new.real is None or new.starts is None:
            return self._run(tokens, new.starts, cache, all_states)
        if cache is None or cache.length == 0:
            order, back = right_align(new.real)
            return [at(x, back) for x in self._run(at(tokens, order), at(new.starts, order), cache, all_states)]
        return self._skip_masked(tokens, new.real, new.starts, cache, all_states)

    def _skip_masked(
        self, tokens: Tensor, real: Tensor, starts: Tensor, cache: FusionTreeCache, all_states: bool
    ) -> list[Tensor]:
        """Run new tokens of which some are masked after cached ones.

        Rows with equally many real tokens run together, without the masked ones, on a copy of their cache that is
        moved right by the number of masked tokens: all rows of the cache end at the same token.
        """
        L, parts = real.shape[1], []
        pieces: list[list[Tensor]] = [[] for _ in range(1 + len(self.blocks) * all_states)]
        counts = real.sum(1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().flatten()
            chosen, part = real[rows], cache.take(rows)
            part.pad_left(L - count)
            parts.append((rows, part))
            before = part.last_hidden[:, None]
            states = [before[:, :0]] * len(pieces)
            if count:
                shape = len(rows), count
                new, new_starts = (x[rows][chosen].unflatten(0, shape) for x in (tokens, starts))
                states = self._run(new, new_starts, part, all_states)
            for piece, state in zip(pieces, states, strict=True):
                known = before if piece is pieces[-1] else torch.zeros_like(before)
                piece.append(at(torch.cat([known.to(state.device), state], 1), chosen.cumsum(1)))
        cache.join(parts)
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return [torch.cat(piece)[order.to(piece[0].device)] for piece in pieces]

    def _run(
        self, tokens: Tensor, starts: Tensor | None, cache: FusionTreeCache | None, all_states: bool
    ) -> list[Tensor]:
        """Run tokens whose masked ones are on the left of an empty row; `starts` as in `NewTokens`."""
        documents = None
        if starts is not None and (cache is None or cache.length == 0):
            documents = Documents.from_seq_idx(starts.cumsum(1).int())
        elif starts is not None and cache is not None:
            documents = Documents.continuing(cache.last_document, cache.next_position, starts)
        self._check_positions(documents, tokens.shape[1], cache)
        states: list[Tensor] | None = [] if all_states else None
        last, _ = self.hidden(tokens, documents, cache=cache, states=states)
        return [*(states or []), last]

    def _check_positions(self, documents: Documents | None, L: int, cache: FusionTreeCache | None) -> None:
        """Raise ValueError if a document exceeds SRTE's learned table; syncs with the device only if one may."""
        seen, longest = 0 if cache is None else cache.length, self._shape.max_positions
        if self._shape.srte != "learned" or seen + L <= longest:
            return
        if documents is None:
            tokens = L if cache is None else int(cache.next_position.max()) + L
        else:
            tokens = int(documents.position_ids.max()) + 1
        if tokens > longest:
            raise ValueError(f"a document has {tokens} tokens, but SRTE's learned table ends at {longest}; shorten it")


def _without_autocast(kernels: Kernels, device_type: str) -> Kernels:
    """Return kernels that keep the precision of their inputs under autocast, which then affects linear layers only."""

    def shielded(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.autocast(device_type, enabled=False)(function)

    shields: dict[str, Any] = {name: shielded(getattr(kernels, name)) for name in OPERATIONS if name != "pointwise"}
    return replace(kernels, **shields, pointwise=Pointwise(*map(shielded, kernels.pointwise)))


class FusionTreeForCausalLM(FusionTreePreTrainedModel, GenerationMixin):
    """The language model with the interface of `AutoModelForCausalLM`."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 - read as a class attribute

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self.model = FusionTreeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.std = config.model_config().embedding_std  # type: ignore[assignment] # read by _init_weights
        self.post_init()

    def new_cache(self, rows: int, device: torch.device | str | None = None) -> FusionTreeCache:
        """Return an empty cache for `rows` rows; by default on the device of the embedding."""
        return self.model.new_cache(rows, device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cache: FusionTreeCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, fp32 [B, L, V], and with labels the loss.

        Args:
            labels: int64 [B, L], not shifted, -100 where there is no loss. Masked tokens and the first token of each
                document are not predicted.
            logits_to_keep: compute logits of the last n tokens, or of the tokens at these indices; 0: of all tokens.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in `FusionTreeModel`.
            output_hidden_states, cache: likewise.
            others: as there; and `shift_labels`, int64 [B, L]: labels of each position, already shifted.
        """
        shift_labels = others.pop("shift_labels", None)  # no parameter: Trainer would take it for required labels
        if labels is not None and shift_labels is None:
            past = given_cache(past_key_values, cache)
            shift_labels = _shifted(labels, NewTokens.read(labels, attention_mask, position_ids, past))
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            cache,
            **others,
        )
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        logits = self.lm_head(output.last_hidden_state[:, kept]).float()
        loss = None
        if shift_labels is not None:
            targets = shift_labels.flatten().to(logits.device)
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
            items = (targets != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss / items
        return CausalLMOutputWithPast(loss, logits, _cache_of(output), output.hidden_states)


def _shifted(labels: Tensor, new: NewTokens) -> Tensor:
    """Return the label of each position: the next token's, unless that is masked or starts a document; [B, L]."""
    for ignored in (None if new.real is None else ~new.real, new.starts):
        if ignored is not None:
            labels = labels.masked_fill(ignored.to(labels.device), IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _cache_of(output: BaseModelOutputWithPast) -> FusionTreeCache | None:
    """Return the cache of an output; the name of its field depends on the version of transformers."""
    return next((value for value in output.values() if isinstance(value, FusionTreeCache)), None)


class FusionTreeForSequenceClassification(FusionTreePreTrainedModel):
    """The model with a linear head on the last token, with the interface of `AutoModelForSequenceClassification`."""

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FusionTreeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: FusionTreeCache | None = None,
        **others: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return the score of each label, [B, labels], and with labels, [B] or [B, labels], the loss.

        Without `attention_mask`, tokens equal to the configuration's `pad_token_id` are masked. The score is that of
        the last real token. Other arguments as in `FusionTreeModel`.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            cache,
            **others,
        )
        logits = self.score(output.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss, logits, _cache_of(output), output.hidden_states)


FusionTreeConfig.register_for_auto_class()
AUTO_CLASSES = {
    "AutoModel": FusionTreeModel,
    "AutoModelForCausalLM": FusionTreeForCausalLM,
    "AutoModelForSequenceClassification": FusionTreeForSequenceClassification,
}
for name, model in AUTO_CLASSES.items():
    model.register_for_auto_class(name)
