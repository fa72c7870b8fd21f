"""Texts that `gigatoken` and the reference library `tokenizers` may encode differently."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers

from fusiontree.data.tokenizer import TextTokenizer

_CODE_POINTS = 0x110000
_FIRST_UNASSIGNED = 0x378  # no version of Unicode leaves a lower code point unassigned
_SURROGATES = range(0xD800, 0xE000)
_CHUNK = 4096  # characters per call of the regular expressions, whose time per character grows with the text


class Divergence:
    """Check of a text for what the two libraries may treat differently.

    Both split text by Unicode's classes, but `gigatoken` has a newer version of Unicode. A text with a code point that
    is unassigned for the reference is therefore left to the reference, as is a text that spells an escaped special
    token, which only the reference splits.

    Normal form C of the reference is still older (Unicode 9). By Unicode's stability policy it differs from a newer
    version only for text with marks or letters assigned since then. In the basic plane those are marks, which are found
    by comparing the libraries; in the first supplementary plane all marks and letters but the mathematical ones are
    left to the reference. In later planes none are reordered or composed.

    Args:
        text_tokenizer: the tokenizer.
        agree: whether both libraries give the same ids for a text.
    """

    def __init__(self, text_tokenizer: TextTokenizer, agree: Callable[[str], bool]):
        self._escaped = text_tokenizer.escaped
        self._suspects = _unassigned().copy()
        if composes(text_tokenizer):
            self._suspects |= _members(r"[\p{L}\p{M}]", range(0x10000, 0x20000))
            self._suspects[0x1D400:0x1D800] = _unassigned()[0x1D400:0x1D800]  # mathematical letters
            for code in np.flatnonzero(_members(r"\p{M}", range(0x10000))):
                # a mark of class 1 after it and one of the highest class before it: one of the two is reordered unless
                # its own class is 0
                self._suspects[code] |= not (agree(f"a{chr(code)}\u0334") and agree(f"a\u0345{chr(code)}"))

    def possible(self, text: str) -> bool:
        """Return whether the libraries may differ on `text`."""
        if any(token in text for token in self._escaped):
            return True
        if text.isascii():
            return False
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return bool(self._suspects[codes[codes >= _FIRST_UNASSIGNED]].any())


def composes(text_tokenizer: TextTokenizer) -> bool:
    """Return whether the tokenizer brings text to normal form C; `gigatoken` loads no other normalizer."""
    normalizer = text_tokenizer.tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") != "e\u0301"


@functools.cache
def _unassigned() -> np.ndarray:
    """Return which code points are unassigned for the reference's regular expressions: bool [0x110000]."""
    return _members(r"\p{Cn}", range(_CODE_POINTS))


def _members(members: str, codes: range) -> np.ndarray:
    """Return which of `codes` match a class of the reference's regular expressions: bool [0x110000]."""
    remove: Any = normalizers.Replace(Regex(f"{members}+"), "")
    text = "".join(chr(code) for code in codes if code not in _SURROGATES)  # which no text has
    others = "".join(remove.normalize_str(text[start : start + _CHUNK]) for start in range(0, len(text), _CHUNK))
    found = np.zeros(_CODE_POINTS, bool)
    for part, is_member in ((text, True), (others, False)):
        found[np.frombuffer(part.encode("utf-32-le"), np.uint32)] = is_member
    return found
