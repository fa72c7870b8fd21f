"""Encoding of text to token ids, identical to those of the reference library `tokenizers`.

`gigatoken` is about fifty times faster. It encodes the texts for which it gives the same ids.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.divergence import Divergence, composes
from data_tools.tokenizers import describe_tokenizer
from fusiontree.data.format import token_dtype
from fusiontree.data.tokenizer import GOLDEN_TEXTS, TOKENIZER_FILE, TextTokenizer, load_text_tokenizer
from fusiontree.errors import RunError, UserError, typed_cause

FAST, REFERENCE = "gigatoken", "tokenizers"
_AUDIT_CHARS = 512  # characters at the head of a text that an audit encodes with both libraries
_RECREATE_CHARS = 1 << 30  # characters after which the fast encoder is recreated: its cache keeps every word it saw

_Encode = Callable[[str], Any]


class Encoder:
    """Encoder of documents for a tokenizer folder.

    `name` is the library in use: `gigatoken` if it loads the tokenizer and agrees with `tokenizers` on the golden texts
    and around every added token, else `tokenizers`. `note` is then the reason. Also with `gigatoken`, texts on which
    the two may differ are encoded by `tokenizers`. `omitted` are the tokens that the folder's post-processor adds to a
    text; documents do not have them.

    Args:
        folder: a Hugging Face tokenizer folder.
        eos: the end-of-document token, see `load_text_tokenizer`.
        library: "auto" for the choice above, or the name of a library to require.

    Raises:
        UserError: see `load_text_tokenizer`; or the required library does not support the tokenizer.
    """

    def __init__(self, folder: Path, eos: str | None = None, library: str = "auto"):
        text_tokenizer = load_text_tokenizer(folder, eos)
        self._reference, self.omitted = text_tokenizer.tokenizer, text_tokenizer.omitted
        self.info = describe_tokenizer(text_tokenizer, folder)
        self._json = _without_special_tokens((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), text_tokenizer)
        self._dtype = token_dtype(self.info.vocab_size)
        self._fast, self.note = (None, "") if library == REFERENCE else self._trusted_fast_encoder(text_tokenizer)
        if library == FAST and self._fast is None:
            raise UserError(f"--encoder {FAST}: {self.note}; omit --encoder")
        self.name = REFERENCE if self._fast is None else FAST
        self._divergence = None if self._fast is None else Divergence(text_tokenizer, self._agree)
        self._chars_since_creation = 0

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a document, followed by the end-of-document token: uint16 or uint32 [tokens]."""
        if self._fast is None or not self._is_fast(text):
            return np.array([*self._ids(text), self.info.eos_id], self._dtype)
        self._chars_since_creation += len(text)
        if self._chars_since_creation > _RECREATE_CHARS:
            self._fast, self._chars_since_creation = _fast_encoder(self._json), len(text)
        ids = self._fast(text)
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1], tokens[-1] = ids, self.info.eos_id
        return tokens

    def audit(self, text: str) -> None:
        """Compare the fast encoder with the reference on the head of a text that it encodes.

        Raises:
            RunError: the ids differ.
        """
        head = text[:_AUDIT_CHARS]
        if self._is_fast(head) and not self._agree(head):
            raise RunError(f"{FAST} and {REFERENCE} encode {head[:40]!r} differently; build with --encoder {REFERENCE}")

    def _is_fast(self, text: str) -> bool:
        return self._divergence is not None and not self._divergence.possible(text)

    def _agree(self, text: str) -> bool:
        assert self._fast is not None
        return bool(self._fast(text).tolist() == self._ids(text))

    def _ids(self, text: str) -> list[int]:
        # the batch call skips the character offsets; with one text it starts no threads
        ids: list[int] = self._reference.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _trusted_fast_encoder(self, text_tokenizer: TextTokenizer) -> tuple[_Encode | None, str]:
        try:
            fast = _fast_encoder(self._json)
        except Exception as error:  # the loader's exceptions are not specified; the reference encodes instead
            return None, f"{FAST} cannot load the tokenizer: {typed_cause(error)}"
        added = self._reference.get_added_tokens_decoder().values()
        if composes(text_tokenizer):
            # the reference finds these in the normalized text, gigatoken in the given one
            normalized = [token.content for token in added if token.normalized and not token.special]
            if unlike := [*normalized, *text_tokenizer.escaped]:
                return None, f"{FAST} does not find {unlike[0]!r} in normalized text"
        for text in [*GOLDEN_TEXTS, *(f"a {token.content} b{token.content}{token.content}c" for token in added)]:
            if not any(token in text for token in text_tokenizer.escaped) and fast(text).tolist() != self._ids(text):
                return None, f"{FAST} encodes {text[:24]!r} differently"
        return fast, ""


def _fast_encoder(definition: str) -> _Encode:
    import gigatoken

    encode: _Encode = gigatoken.Tokenizer.from_json(definition).backend.encode
    return encode


def _without_special_tokens(definition: str, text_tokenizer: TextTokenizer) -> str:
    """Return tokenizer.json without its special tokens: spelled out in a text, they are encoded as characters."""
    values, special = json.loads(definition), set(text_tokenizer.special_tokens)
    values["added_tokens"] = [token for token in values.get("added_tokens") or [] if token["content"] not in special]
    return json.dumps(values)
