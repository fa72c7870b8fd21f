"""Text to token ids: those of the reference library, by one that is some fifty times faster where it gives the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.tokenizers import load_tokenizer
from fusiontree.data.format import token_dtype
from fusiontree.data.tokenizer import GOLDEN_TEXTS
from fusiontree.errors import RunError, UserError

FAST, REFERENCE = "gigatoken", "tokenizers"
_AUDITED = 512  # characters of a text that an audit encodes twice
_RENEWED = 1 << 30  # characters after which the fast encoder starts anew: it keeps all words it has met

_Encode = Callable[[str], Any]


class Encoder:
    """Encodes documents with a tokenizer folder.

    `name` is the library that encodes: `gigatoken` where it loads the tokenizer and agrees with `tokenizers` on the
    golden samples and around every added token, else `tokenizers`; `note` then says why.

    Args:
        folder: a Hugging Face tokenizer folder.
        eos: the end-of-document token, see `load_tokenizer`.
        library: "auto", as above; or one of the two, which is then used or refused.

    Raises:
        UserError: see `load_tokenizer`; or the library cannot do it.
    """

    def __init__(self, folder: Path, eos: str | None = None, library: str = "auto"):
        self._reference, self.info = load_tokenizer(folder, eos)
        self._json = _without_special_tokens((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self._dtype = token_dtype(self.info.vocab_size)
        self._fast, self.note = (None, "") if library == REFERENCE else self._trusted_fast_encoder()
        if library == FAST and self._fast is None:
            raise UserError(f"--encoder {FAST}: {self.note}; leave --encoder out")
        self.name = REFERENCE if self._fast is None else FAST
        self._characters = 0

    def encode(self, text: str) -> np.ndarray:
        """The ids of a document, the end-of-document token last: uint16 or uint32 [tokens]."""
        if self._fast is None:
            return np.array([*self._ids(text), self.info.eos_id], self._dtype)
        self._characters += len(text)
        if self._characters > _RENEWED:
            self._fast, self._characters = _fast_encoder(self._json), len(text)
        ids = self._fast(text)
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1], tokens[-1] = ids, self.info.eos_id
        return tokens

    def audit(self, text: str) -> None:
        """Hold the fast encoder to the reference on the beginning of a text.

        Raises:
            RunError: they disagree.
        """
        head = text[:_AUDITED]
        if self._fast is not None and self._fast(head).tolist() != self._ids(head):
            raise RunError(f"{FAST} and {REFERENCE} encode {head[:40]!r} differently; build with --encoder {REFERENCE}")

    def _ids(self, text: str) -> list[int]:
        # of the batch call, because it skips the offsets; one text starts no threads
        ids: list[int] = self._reference.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _trusted_fast_encoder(self) -> tuple[_Encode | None, str]:
        try:
            fast = _fast_encoder(self._json)
        except Exception as error:  # whatever its loader raises, the reference can do without it
            return None, f"{FAST} cannot load it: {' '.join(str(error).split())}"
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
    """A tokenizer.json in which a special token spelled out is but its characters, as text is data."""
    values = json.loads(definition)
    values["added_tokens"] = [token for token in values.get("added_tokens") or [] if not token.get("special")]
    return json.dumps(values)
