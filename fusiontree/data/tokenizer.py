"""Tokenizer check of a dataset: the ids of a few golden texts, recorded with the reference library."""

from pathlib import Path
from typing import Any

from fusiontree.errors import UserError, short_cause

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"  # the tokenizer files of a dataset
# cases in which libraries and versions have disagreed: spaces, digits, contractions, line ends, scripts, combining
# marks, emoji, non-ASCII white space, a special token spelled out
GOLDEN_TEXTS = (
    "The quick brown fox didn't jump over 1,234,567 lazy dogs; it'll rest.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}  # done\r\n\n\n\tif x!=0:\n",
    "naïve café — ЁЖИК в тумане, 東京タワー, العربية, हिन्दी, ไทย, e\u0301\u0323",
    "\u00a0\u2009\u3000\u200b x \u2028 ½ ²³ ٣٤ \U0001d7d8\U0001d7d9 👩\u200d👧\ufe0f 🇫🇷 \0 \x7f <|endoftext|></s>",
)


def open_tokenizer(folder: Path) -> Any:
    """Load the `tokenizers.Tokenizer` of a folder, the reference for all ids.

    Text is data: a special token spelled out in a text is encoded as characters; nothing is padded or truncated.

    Raises:
        UserError: tokenizer.json is missing or cannot be read.
    """
    from tokenizers import Tokenizer  # imported here because reading a dataset does not need it

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"tokenizer folder {folder} has no tokenizer.json; train one with `fusiontree data tokenizer`")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"tokenizer folder {folder} cannot be read ({short_cause(error)}); retrain or download it again"
        ) from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def golden_samples(tokenizer: Any) -> dict[str, list[int]]:
    """Return the token ids of each of GOLDEN_TEXTS."""
    return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in GOLDEN_TEXTS}


def require_golden(golden: dict[str, list[int]], where: Path | str) -> None:
    """Check that the tokenizer in folder `where` encodes each golden text to its recorded ids.

    Raises:
        UserError: a text gets different ids or is damaged, or the tokenizer cannot be loaded.
    """
    if not golden:
        return
    try:
        "".join(golden).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the manifest has a damaged golden text for tokenizer {where} ({short_cause(error)}); restore the "
            "manifest, or rebuild the dataset"
        ) from None
    tokenizer = open_tokenizer(Path(where))
    for text, ids in golden.items():
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(
                f"tokenizer {where} encodes {text[:24]!r} differently than when the shards were made; "
                "install the version of `tokenizers` used then, or rebuild the dataset"
            )
