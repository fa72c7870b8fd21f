"""Encoding of text to token ids, identical to those of the reference library `tokenizers`.

`gigatoken` is about fifty times faster. It is used where it gives the same ids.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.tokenizers import load_tokenizer
from fusiontree.data.format import token_dtype
from fusiontree.data.tokenizer import GOLDEN_TEXTS
from fusiontree.errors import RunError, UserError, typed_cause

FAST, REFERENCE = "gigatoken", "tokenizers"
_AUDIT_CHARS = 512  # characters at the head of a text that an audit encodes with both libraries
_RECREATE_CHARS = 1 << 30  # characters after which the fast encoder is recreated: its cache keeps every word it saw

_Encode = Callable[[str], Any]


class Encoder:
    """Encoder of documents for a tokenizer folder.

    `name` is the library in use: `gigatoken` if it loads the tokenizer and agrees with `tokenizers` on the golden texts
    and around every added token, else `tokenizers`. `note` is then the reason.

    Args:
        folder: a Hugging Face tokenizer folder.
        eos: the end-of-document token, see `load_tokenizer`.
        library: "auto" for the choice above, or the name of a library to require.

    Raises:
        UserError: see `load_tokenizer`; or the required library does not support the tokenizer.
    """

    def __init__(self, folder: Path, eos: str | None = None, library: str = "auto"):
        self._reference, self.info = load_tokenizer(folder, eos)
        self._json = _without_special_tokens((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self._dtype = token_dtype(self.info.vocab_size)
        self._fast, self.note = (None, "") if library == REFERENCE else self._trusted_fast_encoder()
        if library == FAST and self._fast is None:
            raise UserError(f"--encoder {FAST}: {self.note}; omit --encoder")
        self.name = REFERENCE if self._fast is None else FAST
        self._chars_since_creation = 0

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a document, followed by the end-of-document token: uint16 or uint32 [tokens]."""
        if self._fast is None:
            return np.array([*self._ids(text), self.info.eos_id], self._dtype)
        self._chars_since_creation += len(text)
        if self._chars_since_creation > _RECREATE_CHARS:
            self._fast, self._chars_since_creation = _fast_encoder(self._json), len(text)
        ids = self._fast(text)
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1], tokens[-1] = ids, self.info.eos_id
        return tokens

    def audit(self, text: str) -> None:
        """Compare the fast encoder with the reference on the head of a text.

        Raises:
            RunError: the ids differ.
        """
        head = text[:_AUDIT_CHARS]
        if self._fast is not None and self._fast(head).tolist() != self._ids(head):
            raise RunError(f"{FAST} and {REFERENCE} encode {head[:40]!r} differently; build with --encoder {REFERENCE}")

    def _ids(self, text: str) -> list[int]:
        # the batch call skips the character offsets; with one text it starts no threads
        ids: list[int] = self._reference.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _trusted_fast_encoder(self) -> tuple[_Encode | None, str]:
        try:
            fast = _fast_encoder(self._json)
        except Exception as error:  # the loader's exceptions are not specified; the reference encodes instead
            return None, f"{FAST} cannot load the tokenizer: {typed_cause(error)}"
        added = [token.content for token in self._reference.get_added_tokens_decoder().values()]
        for text in [*GOLDEN_TEXTS, *(f"a {token} b{token}{token}c" for token in added)]:
            if fast(text).tolist() != self._ids(text):
                return None, f"{FAST} encodes {text[:24]!r} differently"
        return fast, ""


def _fast_encoder(definition: str) -> _Encode:
    import gigatoken

    encode: _Encode = gigatoken.Tokenizer.from_json(definition).backend.encode
    return encode


def _without_special_tokens(definition: str) -> str:
    """Return tokenizer.json without its special tokens: spelled out in a text, they are encoded as characters."""
    values = json.loads(definition)
    values["added_tokens"] = [token for token in values.get("added_tokens") or [] if not token.get("special")]
    return json.dumps(values)
