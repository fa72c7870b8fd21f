"""What holds a dataset to the tokenizer that made it: the reference library's ids of a few texts, kept as golden."""

from pathlib import Path
from typing import Any

from fusiontree.errors import UserError

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"  # what a dataset keeps of one
# what libraries and versions have disagreed on: spaces, digits, contractions, line ends, scripts, combining marks,
# emoji, white space that is not ASCII, a token spelled out
GOLDEN_TEXTS = (
    "The quick brown fox didn't jump over 1,234,567 lazy dogs; it'll rest.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}  # done\r\n\n\n\tif x!=0:\n",
    "naïve café — ЁЖИК в тумане, 東京タワー, العربية, हिन्दी, ไทย, e\u0301\u0323",
    "\u00a0\u2009\u3000\u200b x \u2028 ½ ²³ ٣٤ \U0001d7d8\U0001d7d9 👩\u200d👧\ufe0f 🇫🇷 \0 \x7f <|endoftext|></s>",
)


def open_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder, the reference for all ids.

    Text is data: a special token spelled out in a text is encoded as its characters, and nothing is padded or cut.

    Raises:
        UserError: there is no tokenizer.json, or it cannot be read.
    """
    from tokenizers import Tokenizer  # readers of a dataset need none

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"tokenizer folder {folder} holds no tokenizer.json; make one with `fusiontree data tokenizer`")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises bare Exception
        line = " ".join(str(error).split())
        raise UserError(f"tokenizer folder {folder} cannot be read ({line}); train or download it again") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def golden_samples(tokenizer: Any) -> dict[str, list[int]]:
    """The ids of each of GOLDEN_TEXTS."""
    return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in GOLDEN_TEXTS}


def require_golden(golden: dict[str, list[int]], where: Path | str) -> None:
    """Raise UserError unless the tokenizer in folder `where` encodes each text to its ids, as when they were kept."""
    if not golden:
        return
    try:
        "".join(golden).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a golden text for tokenizer {where} is damaged ({error}); restore it, or build the dataset again"
        ) from None
    tokenizer = open_tokenizer(Path(where))
    for text, ids in golden.items():
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(
                f"tokenizer {where} encodes {text[:24]!r} otherwise than when the shards were made; "
                "install the version of `tokenizers` of that time, or build the dataset again"
            )
