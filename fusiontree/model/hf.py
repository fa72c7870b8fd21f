"""The model as Hugging Face tools know it; the only file that imports transformers."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import Cache
from .config import ModelConfig
from .documents import Documents
from .lm import HybridLM
from .recompute import KEEP, Recompute
from .reference import IGNORE


class FusionTreeConfig(PretrainedConfig):
    """`ModelConfig`'s fields as a Hugging Face configuration."""

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
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The shape alone."""
        given = {f.name: getattr(self, f.name) for f in fields(ModelConfig) if hasattr(self, f.name)}
        return ModelConfig(**given)


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
    FP32_NAMES = ("A_log", "D", "dt_bias")  # the scan's state parameters, whatever the dtype of the rest
    _keep_in_fp32_modules_strict = list(FP32_NAMES)  # noqa: RUF012 - likewise

    def __init__(self, config: FusionTreeConfig):
        super().__init__(config)
        self.model = HybridLM(config.model_config())
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, fp32 [B, L, V] (of the last `logits_to_keep` tokens; 0: all), the cache and, with labels, the loss.

        Args:
            input_ids: int64 [B, L]; with a cache, the new tokens only.
            attention_mask: [B, past + L], true or 1 where a token is real; padding may stand on either side.
            past_key_values: the cache of an earlier call, continued in place.
            labels: int64 [B, L], not shifted, -100 where there is no loss.
            use_cache: make a cache and return it; implied by `past_key_values`.
            logits_to_keep: as above.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
        """
        B, L = input_ids.shape
        cache = past_key_values
        if cache is None and use_cache:
            model = self.model
            cache = FusionTreeCache(model.config, B, model.activation_dtype, input_ids.device)
        documents = None if attention_mask is None else Documents.from_mask(attention_mask).last(L)
        output = self.model(input_ids, documents, cache=cache, keep_logits=logits_to_keep or None)
        loss = None
        if labels is not None:
            loss = self._loss(output.logits, labels, attention_mask, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=output.logits, past_key_values=cache)

    def _loss(
        self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, items: int | Tensor | None
    ) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if attention_mask is not None:
            following = F.pad(attention_mask[:, -labels.shape[1] :][:, 1:].bool(), (0, 1), value=False)
            targets = targets.masked_fill(~following, IGNORE)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / (items if items is not None else (targets != IGNORE).sum().clamp(min=1))


FusionTreeConfig.register_for_auto_class()
FusionTreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
