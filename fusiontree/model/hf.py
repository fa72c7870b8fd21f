"""The model as Hugging Face tools know it; the only file that imports transformers."""

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
    """`ModelConfig`'s fields as a Hugging Face configuration, and `kernels`: the back-end by operation.

    Without `kernels` the best that run on the model's device are taken, as the project's own programs do; a key is one
    of `kernel_registry.OPERATIONS`, e.g. ``{"attention": "reference"}``.
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
        kwargs.setdefault("tie_word_embeddings", False)  # a tied model has no second matrix at all
        kwargs.setdefault("kernels", None)
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The shape alone."""
        return ModelConfig.from_dict(vars(self))


class FusionTreeCache(Cache):
    """The model's cache under the names that `generate()` calls."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> "FusionTreeCache":
        """Keep the rows of the chosen beams, int64 [B]."""
        self.select(beam_idx)
        return self


class FusionTreeForCausalLM(PreTrainedModel, GenerationMixin):
    """A hybrid language model with the interface of `AutoModelForCausalLM`."""

    config_class = FusionTreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012 - read as a class attribute by transformers
    # a cache knows its own devices, and is continued in place
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - likewise
    FP32_NAMES = STATE_PARAMETERS
    _keep_in_fp32_modules_strict = list(FP32_NAMES)  # noqa: RUF012 - likewise

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self.model = HybridLM(config.model_config())
        self._kernels_for: tuple[str, torch.dtype] | None = None  # where the kernels were chosen to run
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: `HybridLM` starts its own weights when it is made, and loaded ones must stay as they are."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes the cache

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int | None = None
    ) -> None:
        self.model.recompute = Recompute(every=every_n_layers or 1) if enable else KEEP

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding, and with it a tied head."""
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """The head; None when the embedding is the head too."""
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
        """Logits, fp32 [B, L, V], the cache and, with labels, the loss.

        Args:
            input_ids: int64 [B, L]; with a cache, the new tokens only.
            attention_mask: [B, past + L], true or 1 where a token is real; padding may stand on either side. Behind a
                cache only its last past token and the new ones are read.
            position_ids: int64 [B or 1, L]; where they do not go on by one, a packed row's next document begins. Read
                before anything is cached; tokens behind a cache go on with its last document.
            past_key_values: the cache of an earlier call, continued in place.
            labels: int64 [B, L], not shifted, -100 where there is no loss.
            use_cache: make a cache and return it; implied by `past_key_values`.
            logits_to_keep: make logits of the last so many tokens only, or of those at these places; 0: of all.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            cache: `past_key_values` under the name that transformers gives it from 5.24 on.
            others: what transformers hands to every model; none may hold a cache, which would be passed over.
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
        return CausalLMOutputWithPast(loss, output.logits, cache)  # the cache's name differs by version

    def _documents(
        self, B: int, L: int, mask: Tensor | None, position_ids: Tensor | None, cache: FusionTreeCache | None
    ) -> Documents | None:
        """Where documents lie; None where each row is one, or goes on with its last: no masks, and faster kernels."""
        if cache is not None and cache.length:
            if mask is None or bool(mask[:, -L - 1 :].all()):
                return None
            return Documents.behind(cache.last_document, cache.next_position, mask[:, -L - 1 :])
        if mask is not None and bool(mask.all()):
            mask = None
        resuming = None if position_ids is None else position_ids.diff(dim=1) == 1
        if resuming is None or bool(resuming.all()):
            return None if mask is None else Documents.from_mask(mask)
        return Documents.from_mask(torch.ones(B, L, device=resuming.device) if mask is None else mask, resuming)

    def _check_positions(self, documents: Documents | None, L: int, cache: FusionTreeCache | None) -> None:
        """Raise ValueError where a document is longer than SRTE's learned table; asks the device only if one may be."""
        seen, config = 0 if cache is None else cache.length, self.model.config
        if config.srte != "learned" or seen + L <= config.max_positions:
            return
        if documents is None:
            tokens = L if cache is None else int(cache.next_position.max()) + L
        else:
            tokens = int(documents.position_ids.max()) + 1
        if tokens > config.max_positions:
            raise ValueError(f"a document of {tokens} tokens; SRTE's learned table ends at {config.max_positions}")

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
        """Mean loss of predicting each real token from the one before it in its document."""
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
