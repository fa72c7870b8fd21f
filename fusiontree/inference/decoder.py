"""Chunked prefill and single-token decoding."""

import torch
from torch import Tensor

from fusiontree.model.cache import Cache
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

PREFILL_TOKENS = {"cpu": 2048, "cuda": 32_768}  # per forward, over all rows: bounds the memory of long prompts


class Decoder:
    """A model and its cache; on a GPU a decoding step is replayed as a CUDA graph.

    A step has a few hundred small kernels, and launching them one by one takes longer than running them.
    """

    _EAGER_STEPS = 2  # before the capture: kernels must be compiled and tuned first

    def __init__(self, model: HybridLM, rows: int, room: int):
        """Reserve a cache for `rows` rows of `room` tokens each, prompt and answer together; it grows if needed."""
        self.model, self.cache = model, model.new_cache(rows)
        self.token = torch.zeros(rows, dtype=torch.int64, device=model.embedding.weight.device)
        self._make_room(room)

    def _make_room(self, tokens: int) -> None:
        """Reserve `tokens` tokens per row and drop the graph, which has the addresses of the old cache."""
        self.cache.reserve(tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0  # since the cache moved

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the prompts through the model in pieces.

        Args:
            ids: int64 [B, L].
            mask: bool or integer [B, L], false on the left padding of shorter prompts.

        Returns:
            Logits of the last token, fp32 [B, V].
        """
        B, L = ids.shape
        if self.cache.length + L > self.cache.capacity:
            self._make_room(self.cache.length + L)
        if mask is not None:
            mask = None if bool(mask.all()) else mask.bool()  # without padding the faster kernels apply
        if mask is not None and self.cache.length == 0 and 2 * int(mask.sum()) < B * L and bool(mask.any(1).all()):
            return self._prefill_by_row(ids, mask)  # mostly padding, but no row is only padding
        return self._prefill(self.cache, ids, mask)

    def _prefill(self, cache: Cache, ids: Tensor, mask: Tensor | None) -> Tensor:
        B, L = ids.shape
        piece = max(1, PREFILL_TOKENS[ids.device.type] // B)
        for start in range(0, L, piece):
            end = min(start + piece, L)
            documents = None if mask is None else Documents.from_mask(mask[:, :end]).last(end - start)
            logits = self.model(ids[:, start:end], documents, cache=cache, keep_logits=1).logits[:, -1]
        return logits

    def _prefill_by_row(self, ids: Tensor, mask: Tensor) -> Tensor:
        L = ids.shape[1]
        starts = (L - mask.sum(1)).tolist()
        rows = [self.cache.row_view(index, start) for index, start in enumerate(starts)]
        logits = [self._prefill(row, ids[i : i + 1, starts[i] :], None) for i, row in enumerate(rows)]
        self.cache.merge_rows(rows, L)
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """Append one token per row, int64 [B], and return logits fp32 [B, V], which the next step may overwrite."""
        if self.cache.length == self.cache.capacity:  # beyond the reserved capacity
            self._make_room(self.cache.length + 1)
        self.steps += 1
        if token.device.type != "cuda" or self.steps <= self._EAGER_STEPS:
            return self._forward(token)
        self.token.copy_(token)
        if self.graph is None:
            self.graph, length = torch.cuda.CUDAGraph(), self.cache.length
            with torch.cuda.graph(self.graph):
                self.logits = self._forward(self.token)
            self.cache.length = length  # the capture advanced it without running the kernels
        self.graph.replay()
        self.cache.length += 1
        return self.logits

    def _forward(self, token: Tensor) -> Tensor:
        return self.model(token[:, None], cache=self.cache).logits[:, -1]
