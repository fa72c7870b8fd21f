"""Incremental decoding of one model: chunked prefill, then one token a step."""

import torch
from torch import Tensor

from fusiontree.model.cache import Cache
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

PREFILL_TOKENS = {"cpu": 2048, "cuda": 32_768}  # of all rows, in one forward over a piece of the prompts: bounds memory


class Decoder:
    """A model and its cache; on a GPU one step is a CUDA graph.

    Launched one by one, the step's few hundred small kernels would take longer than they run.
    """

    _EAGER_STEPS = 2  # before the capture, so that everything is compiled and tuned by then

    def __init__(self, model: HybridLM, rows: int, room: int):
        """`room`: tokens per row, of prompt and answer together, that the cache makes room for at once."""
        self.model, self.cache = model, model.new_cache(rows)
        self.token = torch.zeros(rows, dtype=torch.int64, device=model.embedding.weight.device)
        self._make_room(room)

    def _make_room(self, tokens: int) -> None:
        """The cache moves, and a graph of where it was is worth nothing."""
        self.cache.reserve(tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0  # since then

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take in the prompts, in pieces.

        Args:
            ids: int64 [B, L]. mask: bool or integer [B, L], false on the padding at the left of shorter prompts.

        Returns:
            Logits of the last token, fp32 [B, V].
        """
        B, L = ids.shape
        if self.cache.length + L > self.cache.room:
            self._make_room(self.cache.length + L)
        if mask is not None:
            mask = None if bool(mask.all()) else mask.bool()  # whole rows need none and take the faster kernels
        if mask is not None and self.cache.length == 0 and 2 * int(mask.sum()) < B * L and bool(mask.any(1).all()):
            return self._prefill_by_row(ids, mask)  # more padding than prompt, and no row of padding alone
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
        rows = [self.cache.row(index, start) for index, start in enumerate(starts)]
        logits = [self._prefill(row, ids[i : i + 1, starts[i] :], None) for i, row in enumerate(rows)]
        self.cache.join(rows, L)
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """Take in one more token of every row, int64 [B]; logits fp32 [B, V], which the next step may overwrite."""
        if self.cache.length == self.cache.room:  # more than was asked for
            self._make_room(self.cache.length + 1)
        self.steps += 1
        if token.device.type != "cuda" or self.steps <= self._EAGER_STEPS:
            return self._forward(token)
        self.token.copy_(token)
        if self.graph is None:
            self.graph, length = torch.cuda.CUDAGraph(), self.cache.length
            with torch.cuda.graph(self.graph):
                self.logits = self._forward(self.token)
            self.cache.length = length  # a capture runs nothing
        self.graph.replay()
        self.cache.length += 1
        return self.logits

    def _forward(self, token: Tensor) -> Tensor:
        return self.model(token[:, None], cache=self.cache).logits[:, -1]
