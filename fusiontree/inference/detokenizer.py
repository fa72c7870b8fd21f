"""Incremental decoding of tokens to text."""

import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of byte fallback


class TextStream:
    """The text that new tokens add to a prompt, passed to `on_text` as soon as later tokens cannot change it.

    Prompt and new tokens are decoded together; the pieces add up to the part after the decoded prompt. The new tokens
    decoded alone would differ: many decoders remove a space at the start. Each piece is decoded after the tokens of the
    previous piece only, so the time per token does not grow with the text.

    Args:
        tokenizer: decodes the tokens.
        prompt: token ids.
        stop: the token that ends the text, or None.
        on_text: called with each piece.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ):
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._ids, self._prompt_tokens = list(prompt), len(prompt)
        self._context, self._shown = 0, len(prompt)  # index of the first token to decode, and of the first not shown
        added = tokenizer.get_added_tokens_decoder()
        self._invisible = {number for number, added_token in added.items() if added_token.special}
        self._pieces: list[str] = []
        self._ended = False

    @property
    def new_tokens(self) -> int:
        """The number of new tokens before the first `stop`."""
        return len(self._ids) - self._prompt_tokens

    def add(self, token: int) -> None:
        """Append the next token; tokens from the first `stop` on are ignored."""
        self._ended = self._ended or token == self._stop
        if self._ended:
            return
        self._ids.append(token)
        # if one byte of a run of byte tokens is invalid, so is the complete run: its end must be known
        if token not in self._invisible and not _BYTE.fullmatch(self._tokenizer.id_to_token(token) or ""):
            self._show(is_last=False)

    def finish(self) -> str:
        """Show the remaining text and return the complete text."""
        self._show(is_last=True)
        return "".join(self._pieces)

    def _show(self, is_last: bool) -> None:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if text.startswith(before):
            piece = text[len(before) :]
        elif is_last:  # new bytes have made the last character of the prompt invalid
            piece = self._decode(self._ids[self._shown :])
        else:
            return
        if not piece or (piece.endswith("\ufffd") and not is_last):  # bytes of the last character may be missing
            return
        self._context, self._shown = self._shown, len(self._ids)
        self._pieces.append(piece)
        if self._on_text is not None:
            self._on_text(piece)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
