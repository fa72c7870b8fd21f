"""Text from an exported folder: sampling, and decoding with the cache."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusiontree.errors import UserError
from fusiontree.exported import check_positions, load_export, read_facts
from fusiontree.files import parse_json
from fusiontree.model.cache import Cache
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

PREFILL_TOKENS = {"cpu": 2048, "cuda": 32_768}  # of all rows, in one forward over a piece of the prompts: bounds memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0  # 0: the likeliest token, always
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the smallest set of the likeliest whose probability reaches p
    min_p: float = 0.0  # drop what is less likely than this share of the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely (arXiv 1909.05858)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition-penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not holds:
                raise UserError(f"--{name} is {getattr(self, name.replace('-', '_'))}; it must be {rule}")


def generate_text(
    folder: Path, prompt: str, max_new_tokens: int, sampling: Sampling, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Continue `prompt` with the model exported to `folder`.

    Args:
        on_text: called with the prompt, then with each new piece of text as it comes.

    Returns:
        The text that was added, its tokens and the prompt's.

    Raises:
        UserError: the folder is no export, or the prompt has no token.
    """
    (figures,) = generate_texts(folder, {"the prompt": prompt}, max_new_tokens, sampling, on_text=on_text)
    return figures


def generate_texts(
    folder: Path,
    prompts: Mapping[str, str],
    max_new_tokens: int,
    sampling: Sampling,
    rows: int = 8,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Continue `prompts`, `rows` of them together; each gives what it would alone.

    Args:
        prompts: by what to call them in messages. on_text: as of `generate_text`, of the first prompt of each batch.

    Yields:
        For each prompt, in order, what `generate_text` returns.

    Raises:
        UserError: the folder is no export, or a prompt has no token or too many.
    """
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch", rows)):
        if not 1 <= value < 2**31:
            raise UserError(f"{name} is {value}; it must be from 1 to 2^31 - 1")
    for name, prompt in prompts.items():
        _check_prompt(name, prompt)
    model, tokenizer = load_export(folder)
    texts = list(prompts.values())
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    check_ids(model.config, dict(zip(prompts, ids, strict=True)))
    check_positions(model.config, max(map(len, ids)) + max_new_tokens)
    stop = read_facts(folder)["eos_id"]
    for start in range(0, len(ids), rows):
        batch = ids[start : start + rows]
        streams = [_TextStream(tokenizer, stop, None if on_text is None or i else on_text) for i in range(len(batch))]
        if on_text is not None:
            on_text(texts[start])
        for tokens in stream_tokens(model, batch, max_new_tokens, sampling, stop):
            for stream, token in zip(streams, tokens, strict=True):
                stream.add(token)
        for i, stream in enumerate(streams):
            text = stream.finish()
            yield {
                "prompt": texts[start + i],
                "text": text,
                "prompt_tokens": len(batch[i]),
                "new_tokens": len(stream.ids),
            }


def _check_prompt(name: str, prompt: str) -> None:
    if not prompt:
        raise UserError(f"{name} is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{name} is not UTF-8; give text that is")


def read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a file by their place: a line each, or of a `.jsonl` file the key `prompt` of each line's object.

    Raises:
        UserError: it cannot be read, holds none, or a line is empty or no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # no other character ends a line
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no file of prompts at {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    prompts = {f"{path} line {number}": line for number, line in enumerate(lines, 1)}
    if lines == [""]:
        raise UserError(f"{path} holds no prompt; write one a line")
    if path.suffix == ".jsonl":
        prompts = {place: _prompt_of(place, line) for place, line in prompts.items()}
    for place, prompt in prompts.items():
        _check_prompt(place, prompt)
    return prompts


def _prompt_of(place: str, line: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{place} is no object such as {{"prompt": "It was"}}') from None
    if not isinstance(prompt, str):
        raise UserError(f"{place}: prompt is {prompt!r}; it must be text")
    return prompt


class _TextStream:
    """One row's tokens up to its first `stop`, shown as text as soon as they are whole characters."""

    def __init__(self, tokenizer: Tokenizer, stop: int | None, on_text: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.on_text = tokenizer, stop, on_text
        self.ids: list[int] = []
        self.shown, self.ended = "", False

    def add(self, token: int) -> None:
        """Take in the next token."""
        self.ended = self.ended or token == self.stop
        if self.ended:
            return
        self.ids.append(token)
        if self.on_text is not None:
            text = self._text()
            if not text.endswith("\ufffd"):  # half a character waits for its other half
                self._show(text)

    def finish(self) -> str:
        """Show the rest; all of the text."""
        text = self._text()
        self._show(text)
        return text

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> None:
        if self.on_text is not None:
            self.on_text(text[len(self.shown) :])
        self.shown = text


@torch.inference_mode()
def stream_tokens(
    model: HybridLM, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, stop: int | None
) -> Iterator[list[int]]:
    """Yield, step by step, the next token of every row (`stop` for rows that have ended) until all have ended.

    Prompts of different lengths are padded on the left; a row's tokens do not depend on its neighbours.

    Raises:
        UserError: a prompt is empty, a token is none of the model's, or so many tokens do not fit in memory.
    """
    check_ids(model.config, {f"prompt {number}": prompt for number, prompt in enumerate(prompts)})
    device, longest = model.embedding.weight.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]
    with _refusing_lack_of_memory(len(prompts), longest + max_new_tokens):
        decoder = Decoder(model, len(prompts), room=longest + max_new_tokens)
    logits = decoder.prefill(ids, mask)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        rows = zip(logits, seen, generators, strict=True)
        token = torch.stack([draw(row, before, sampling, generator) for row, before, generator in rows])
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        if ended.all():
            return
        yield token.tolist()
        if step + 1 == max_new_tokens:
            return
        seen.scatter_(1, token[:, None], True)
        logits = decoder.step(token)


@contextlib.contextmanager
def _refusing_lack_of_memory(rows: int, tokens: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of a CPU's memory torch says no more
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"the memory here does not hold the cache of {rows} rows of {tokens:,} tokens; lower --max-new-tokens or "
            "--batch"
        ) from None


def check_ids(config: ModelConfig, prompts: Mapping[str, list[int]]) -> None:
    """Raise UserError, with its name, if a prompt is empty or holds a token that the model does not have."""
    for name, prompt in prompts.items():
        if not prompt:
            raise UserError(f"{name} has no token; give at least one")
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            last = config.vocab_size - 1
            raise UserError(f"{name}: token {wrong} is out of range; the model's are 0 to {last}")


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


def draw(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token from `logits` [V] by `sampling`; `seen`, bool [V], are those in the row so far. int64 ()."""
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax()
    logits = logits.double() - logits.max()  # so that no temperature, however small, makes an infinity of the greatest
    probabilities, order = candidates(logits / sampling.temperature, sampling)
    return order[torch.multinomial(probabilities, 1, generator=generator)[0]]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities of `logits` [V], likeliest first and 0 where `sampling` rules the token out, and the tokens.

    In fp64: a sum of some ten thousand fp32 probabilities would reach p too early or too late.
    """
    ordered, order = logits.double().sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    return probabilities * keep, order
