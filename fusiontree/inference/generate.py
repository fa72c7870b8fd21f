"""Text generation from an exported folder: batched, streamed, decoded with the cache."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fusiontree.errors import UserError
from fusiontree.files import parse_json, read_text
from fusiontree.inference.decoder import Decoder
from fusiontree.inference.detokenizer import TextStream
from fusiontree.inference.loading import check_ids, check_positions, encode, load_export, read_facts
from fusiontree.inference.sampling import Sampling, draw
from fusiontree.model.cache import Cache
from fusiontree.model.lm import HybridLM

_BATCH_BYTES = 2**28  # of a batch's cache, logits and seen tokens on a CPU


def generate_text(
    folder: Path, prompt: str, max_new_tokens: int, sampling: Sampling, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Continue `prompt` with the model exported to `folder`.

    Args:
        on_text: called with the prompt, then with each new piece of text, as soon as later tokens cannot change it.

    Returns:
        `prompt`, the new `text`, `prompt_tokens` and `new_tokens`.

    Raises:
        UserError: the folder is not an export, or the prompt has no token.
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
    """Continue `prompts` in batches; a prompt's continuation does not depend on its batch.

    Args:
        prompts: by their name in error messages.
        rows: maximum number of prompts in a batch; on a CPU, fewer if their cache exceeds `_BATCH_BYTES`.
        on_text: as in `generate_text`, for the first prompt of each batch.

    Yields:
        The result of each prompt in order, as `generate_text` returns it.

    Raises:
        UserError: the folder is not an export, or a prompt has no token or too many.
    """
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch", rows)):
        if not 1 <= value < 2**31:
            raise UserError(f"{name} is {value}; it must be from 1 to 2^31 - 1")
    for name, prompt in prompts.items():
        _check_prompt(name, prompt)
    model, tokenizer = load_export(folder)
    texts, longest = list(prompts.values()), 0
    for name, text in prompts.items():  # all are checked before the first is continued, and encoded again by batch
        tokens = encode(tokenizer, text)
        check_ids(model.config, {name: tokens})
        longest = max(longest, len(tokens))
    check_positions(model.config, longest + max_new_tokens)
    stop = read_facts(folder)["eos_id"]
    rows = min(rows, _fitting_rows(model, longest + max_new_tokens))
    for start in range(0, len(texts), rows):
        batch = [encode(tokenizer, text) for text in texts[start : start + rows]]
        streams = [TextStream(tokenizer, prompt, stop, None if i else on_text) for i, prompt in enumerate(batch)]
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
                "new_tokens": stream.new_tokens,
            }


def _fitting_rows(model: HybridLM, tokens: int) -> int:
    """Return the largest number of rows of `tokens` tokens to decode at once; a GPU's limit is its memory."""
    weight = model.embedding.weight
    if weight.device.type != "cpu":
        return 2**31
    cache = Cache(model.config, 1, weight.dtype, "meta")
    cache.reserve(tokens)
    row_bytes = cache.nbytes + model.config.vocab_size * (torch.float32.itemsize + torch.bool.itemsize)
    return max(1, _BATCH_BYTES // row_bytes)


def _check_prompt(name: str, prompt: str) -> None:
    if not prompt:
        raise UserError(f"{name} is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{name} is not valid UTF-8; give UTF-8 text")


def read_prompts(path: Path) -> dict[str, str]:
    """Read a file of prompts, one per line; in a `.jsonl` file each line is an object with the key `prompt`.

    Returns:
        The prompts by file and line number.

    Raises:
        UserError: the file cannot be read or has no prompts, or a line is empty or not such an object.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no prompts file at {path}; give a text file or a .jsonl file") from None
    lines = text.removesuffix("\n").split("\n")  # `splitlines` would also split at \f, \x85 and \u2028
    prompts = {f"{path} line {number}": line for number, line in enumerate(lines, 1)}
    if lines == [""]:
        raise UserError(f"{path} has no prompts; write one per line")
    if path.suffix == ".jsonl":
        prompts = {location: _parse_prompt(location, line) for location, line in prompts.items()}
    for location, prompt in prompts.items():
        _check_prompt(location, prompt)
    return prompts


def _parse_prompt(location: str, line: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{location} is not an object such as {{"prompt": "It was"}}') from None
    if not isinstance(prompt, str):
        raise UserError(f"{location}: prompt is {prompt!r}; it must be a string")
    return prompt


@torch.inference_mode()
def stream_tokens(
    model: HybridLM, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, stop: int | None
) -> Iterator[list[int]]:
    """Yield the next token of every row at each step, `stop` for rows that have ended, until all rows have ended.

    Prompts of different lengths are padded on the left. Each row has its own random generator, so its tokens do not
    depend on the other rows.

    Raises:
        UserError: a prompt is empty, a token is outside the vocabulary, or the cache does not fit in memory.
    """
    check_ids(model.config, {f"prompt {number}": prompt for number, prompt in enumerate(prompts)})
    device, longest = model.embedding.weight.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]
    with _oom_as_user_error(len(prompts), longest + max_new_tokens):
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
def _oom_as_user_error(rows: int, tokens: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no exception class of its own for a failed CPU allocation
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"not enough memory for the cache of {rows} rows of {tokens:,} tokens; lower --max-new-tokens or --batch"
        ) from None
