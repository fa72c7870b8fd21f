"""The model with the interfaces of Hugging Face transformers; the only file of the model that imports it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .kernel_registry import select
from .lm import HybridLM
from .loss import IGNORE
from .mamba import STATE_PARAMETERS
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
    }

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("tie_word_embeddings", False)  # even for a tied model: it has one matrix only
        kwargs.setdefault("kernels", None)
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """Return the model's shape."""
        return ModelConfig.from_dict(vars(self))


class FusionTreeCache(Cache):
    """The model's cache with the methods that `generate()` calls."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> "FusionTreeCache":
        """Select the rows of the chosen beams, int64 [B]."""
        self.select(beam_idx)
        return self


class FusionTreeForCausalLM(PreTrainedModel, GenerationMixin):
    """The hybrid language model with the interface of `AutoModelForCausalLM`."""

    config_class = FusionTreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012 - read as a class attribute by transformers
    # the cache moves its layers itself; a copy by accelerate would not be continued in place
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - likewise
    FP32_NAMES = STATE_PARAMETERS
    _keep_in_fp32_modules_strict = list(FP32_NAMES)  # noqa: RUF012 - likewise

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self.model = HybridLM(config.model_config())
        self._kernels_for: tuple[str, torch.dtype] | None = None  # device type and dtype of the chosen kernels
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: `HybridLM` initializes its weights itself, and loaded weights must not change."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass creates the cache

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int | None = None
    ) -> None:
        self.model.recompute = Recompute(every=every_n_layers or 1) if enable else KEEP

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding, and thereby a tied head."""
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Return the head; None if it is tied to the embedding."""
        return self.model.head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the head."""
        self.model.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cache: FusionTreeCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, fp32 [B, L, V], the cache and, with labels, the loss.

        Args:
            input_ids: int64 [B, L]; with a cache, the new tokens only.
            attention_mask: [B, past + L], true or 1 where a token is real; padding may be on either side. With a filled
                cache, only the last past token and the new tokens are read.
            position_ids: int64 [B or 1, L]; where they do not increase by one, the next document of a packed row
                starts. Ignored with a filled cache: new tokens continue the last document of their row.
            past_key_values: the cache of an earlier call, continued in place.
            labels: int64 [B, L], not shifted, -100 where there is no loss.
            use_cache: create a cache and return it; implied by `past_key_values`.
            logits_to_keep: compute logits of the last n tokens, or of the tokens at these indices; 0: of all tokens.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            cache: new name of `past_key_values`, from transformers 5.24.
            others: arguments that transformers passes to every model, ignored.

        Raises:
            TypeError: one of `others` is a cache.
            ValueError: a document is longer than SRTE's learned table.
        """
        if any(isinstance(value, Cache) for value in others.values()):
            raise TypeError(
                f"this model takes its cache as past_key_values or cache, not as one of {', '.join(others)}"
            )
        B, L = input_ids.shape
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            model = self.model
            cache = FusionTreeCache(model.config, B, model.activation_dtype, input_ids.device)
        documents = self._documents(B, L, attention_mask, position_ids, cache)
        self._check_positions(documents, L, cache)
        kind = input_ids.device.type
        self.model.compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._choose_kernels(kind)
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else logits_to_keep or None
        with torch.autocast(kind, enabled=False):  # the layers cast their weights themselves
            output = self.model(input_ids, documents, cache=cache, keep_logits=keep)
        loss = None
        if labels is not None:
            loss = self._loss(output.logits, labels, attention_mask, documents, num_items_in_batch)
        return CausalLMOutputWithPast(loss, output.logits, cache)  # positional: the cache's name depends on the version

    def _documents(
        self, B: int, L: int, mask: Tensor | None, position_ids: Tensor | None, cache: FusionTreeCache | None
    ) -> Documents | None:
        """Return the documents; None, which is faster, if each row is one document or continues one."""
        if cache is not None and cache.length:
            if mask is None or bool(mask[:, -L - 1 :].all()):
                return None
            return Documents.continuing(cache.last_document, cache.next_position, mask[:, -L - 1 :])
        if mask is not None and bool(mask.all()):
            mask = None
        resuming = None if position_ids is None else position_ids.diff(dim=1) == 1
        if resuming is None or bool(resuming.all()):
            return None if mask is None else Documents.from_mask(mask)
        return Documents.from_mask(torch.ones(B, L, device=resuming.device) if mask is None else mask, resuming)

    def _check_positions(self, documents: Documents | None, L: int, cache: FusionTreeCache | None) -> None:
        """Raise ValueError if a document exceeds SRTE's learned table; syncs with the device only if one may."""
        seen, config = 0 if cache is None else cache.length, self.model.config
        if config.srte != "learned" or seen + L <= config.max_positions:
            return
        if documents is None:
            tokens = L if cache is None else int(cache.next_position.max()) + L
        else:
            tokens = int(documents.position_ids.max()) + 1
        if tokens > config.max_positions:
            raise ValueError(
                f"a document has {tokens} tokens, but SRTE's learned table ends at {config.max_positions}; shorten it"
            )

    def _choose_kernels(self, device_type: str) -> None:
        here = device_type, self.model.activation_dtype
        if here != self._kernels_for:
            self.model.use_kernels(select(self.config.kernels, device_type, self.model.config, here[1]))
            self._kernels_for = here

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        documents: Documents | None,
        items: int | Tensor | None,
    ) -> Tensor:
        """Return the mean loss of predicting each real token from the previous token of its document."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if mask is not None:
            targets = targets.masked_fill(~F.pad(mask[:, -labels.shape[1] :][:, 1:].bool(), (0, 1)), IGNORE)
        if documents is not None:
            targets = targets.masked_fill(F.pad(documents.seq_idx.diff(dim=1) != 0, (0, 1)), IGNORE)
        targets = targets.flatten().to(logits.device)
        total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
        return total / (items if items is not None else (targets != IGNORE).sum().clamp(min=1))


FusionTreeConfig.register_for_auto_class()
FusionTreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
