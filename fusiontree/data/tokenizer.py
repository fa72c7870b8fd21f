"""The reference tokenizer of a folder, with one treatment of text in training, generation, evaluation and export.

Text is data: no text encodes to a special token, and no token is added in front of a text or after it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.errors import UserError, short_cause
from fusiontree.files import parse_json, write_atomic

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"  # the tokenizer files of a dataset
# end-of-document tokens of common model families, tried if no configuration file names one
_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|endofdocument|>", "[EOS]")
# cases in which libraries and versions have disagreed: spaces, digits, contractions, line ends, scripts, combining
# marks, emoji, non-ASCII white space, a special token spelled out
GOLDEN_TEXTS = (
    "The quick brown fox didn't jump over 1,234,567 lazy dogs; it'll rest.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}  # done\r\n\n\n\tif x!=0:\n",
    "naïve café — ЁЖИК в тумане, 東京タワー, العربية, हिन्दी, ไทย, e\u0301\u0323",
    "\u00a0\u2009\u3000\u200b x \u2028 ½ ²³ ٣٤ \U0001d7d8\U0001d7d9 👩\u200d👧\ufe0f 🇫🇷 \0 \x7f <|endoftext|></s>",
)
_RARE_TEXT = "\U00013080 \ua66e \U0001242b \U0010fffd \U0010ffff"  # its characters are in hardly any vocabulary


@dataclass(frozen=True)
class TextTokenizer:
    """A folder's `tokenizers.Tokenizer`, prepared to encode text as data."""

    tokenizer: Any
    eos: str  # the end-of-document token
    omitted: tuple[str, ...]  # tokens that the folder's post-processor adds to a text, and that are not added here
    escaped: tuple[str, ...]  # special tokens that the model would give for a text that spells them; it is split there
    definition: str  # tokenizer.json of `tokenizer`: the folder's own text if nothing had to be changed

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, among them the end-of-document token."""
        return _special_tokens(self.tokenizer)


def open_tokenizer(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a folder, the reference for all ids; see `load_text_tokenizer`."""
    return load_text_tokenizer(folder).tokenizer


def load_text_tokenizer(folder: Path, eos: str | None = None) -> TextTokenizer:
    """Load the tokenizer of a folder, the reference for all ids.

    A special token spelled out in a text is encoded as characters, also by a model that has it in its own vocabulary;
    nothing is padded, truncated or added.

    Args:
        folder: a Hugging Face tokenizer folder.
        eos: the end-of-document token; None: the `eos_token` of tokenizer_config.json or special_tokens_map.json, else
            the only well-known end-of-document token in the vocabulary.

    Raises:
        UserError: a file is missing or unreadable, the end-of-document token is unknown or ambiguous, or the tokenizer
            encodes at random or gives a special token for text.
    """
    from tokenizers import Tokenizer  # imported here because reading a dataset does not need it

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"tokenizer folder {folder} has no tokenizer.json; train one with `fusiontree data tokenizer`")
    try:
        definition = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"tokenizer folder {folder} cannot be read ({short_cause(error)}); retrain or download it again"
        ) from None
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise UserError(
            f"tokenizer folder {folder} encodes at random (BPE dropout {dropout:g}); set model.dropout in "
            f"{TOKENIZER_FILE} to null"
        )
    tokenizer.encode_special_tokens = True
    eos = _eos_token(tokenizer, folder, eos)
    changed = tokenizer.padding is not None or tokenizer.truncation is not None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    changed |= _mark_special(tokenizer, eos)
    try:
        omitted = _omit_post_processor(tokenizer)
        escaped = _escape(tokenizer)
        _require_text(tokenizer, eos, folder)
    except UserError:
        raise
    except Exception as error:  # a WordLevel model without unknown token, for one
        raise UserError(
            f"tokenizer folder {folder} cannot encode every text ({short_cause(error)}); add an unknown token, or "
            "train a byte-level tokenizer with `fusiontree data tokenizer`"
        ) from None
    if changed or omitted or escaped:
        definition = tokenizer.to_str(pretty=True)
    return TextTokenizer(tokenizer, eos, omitted, escaped, definition)


def named_token(folder: Path, name: str) -> tuple[Path, str] | None:
    """Return the token that a folder's configuration files give for `name`, such as `eos_token`, and the file.

    Raises:
        UserError: a file cannot be read.
    """
    for path in (folder / TOKENIZER_CONFIG, folder / "special_tokens_map.json"):
        token = read_json(path).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return path, token
    return None


def plain_config(eos: str, pad: str, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the tokenizer_config.json with which transformers takes tokenizer.json as it is.

    Of the `source` configuration it keeps only the chat template: tokenizer classes, flags and lists of tokens can
    rebuild the split or add tokens, so that ids differ from those of training. It names no token that begins a text,
    because none was trained.
    """
    template = {"chat_template": source["chat_template"]} if source and source.get("chat_template") else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        "padding_side": "left",  # a batch is continued at its right end
        "model_max_length": int(1e30),  # no limit, as Hugging Face writes it: the context length belongs to the model
        "clean_up_tokenization_spaces": False,
        **template,
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write tokenizer_config.json."""
    write_atomic(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a tokenizer's configuration file; an empty one if there is no file.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({short_cause(error)}); train or download the tokenizer again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read (not a JSON object); train or download the tokenizer again")
    return values


def _eos_token(tokenizer: Any, folder: Path, given: str | None) -> str:
    """Return the end-of-document token; it is in the vocabulary."""
    found = named_token(folder, "eos_token") if given is None else ("--eos", given)
    if found is not None:
        where, token = found
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{where} names {token!r}, which is not in the vocabulary; {_eos_advice(tokenizer)}")
        return token
    known = [token for token in _KNOWN_EOS if tokenizer.token_to_id(token) is not None]
    if len(known) != 1:
        raise UserError(f"tokenizer folder {folder} names no end-of-document token; {_eos_advice(tokenizer)}")
    return known[0]


def _eos_advice(tokenizer: Any) -> str:
    """Return the remedy of an error: --eos, with candidates from the vocabulary."""
    special = sorted(_special_tokens(tokenizer))
    candidates = [token for token in _KNOWN_EOS if tokenizer.token_to_id(token) is not None]
    candidates += [token for token in special if token not in candidates]
    return f"give --eos TOKEN, for example {' or '.join(candidates[:8])}" if candidates else "give --eos TOKEN"


def _mark_special(tokenizer: Any, eos: str) -> bool:
    """Mark the end-of-document token as special, as transformers does; return whether it was not yet."""
    from tokenizers import AddedToken

    if eos in _special_tokens(tokenizer):
        return False
    tokenizer.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    return True


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _omit_post_processor(tokenizer: Any) -> tuple[str, ...]:
    """Remove a post-processor that adds tokens to a text; return those tokens."""
    if not tokenizer.num_special_tokens_to_add(False):
        return ()
    encoded = tokenizer.encode("a", add_special_tokens=True)
    tokenizer.post_processor = None
    return tuple(token for token, added in zip(encoded.tokens, encoded.special_tokens_mask, strict=True) if added)


def _escape(tokenizer: Any) -> tuple[str, ...]:
    """Split text after the first character of each special token that the model would give for it.

    Unigram, WordLevel, WordPiece and BPE with `ignore_merges` look words up in the model's own vocabulary, which often
    contains the special tokens. The split comes last, so no other text is encoded differently.
    """
    from tokenizers import Regex, pre_tokenizers

    def is_given(token: str) -> bool:
        return tokenizer.token_to_id(token) in [piece.id for piece in tokenizer.model.tokenize(token)]

    # a single character cannot be split; `_require_text` reports it
    escaped = tuple(token for token in _special_tokens(tokenizer) if len(token) > 1 and is_given(token))
    if escaped:
        pattern = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in escaped)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        first = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, split])
    return escaped


def _require_text(tokenizer: Any, eos: str, folder: Path) -> None:
    """Check that no text gives a special token, except unknown characters the token that stands for them."""

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    unknown = set(ids(_RARE_TEXT))
    if tokenizer.token_to_id(eos) in unknown:
        raise UserError(
            f"tokenizer folder {folder} encodes characters outside its vocabulary as the end-of-document token {eos!r};"
            " give another token as --eos"
        )
    for token in _special_tokens(tokenizer):
        number = tokenizer.token_to_id(token)
        if number not in unknown and any(number in ids(text) for text in (token, f" {token} a{token}b{token}{token}")):
            remedy = "give another token as --eos" if token == eos else "use a tokenizer without this special token"
            raise UserError(
                f"tokenizer folder {folder} encodes the text {token!r} as the special token of that name; {remedy}"
            )


def golden_samples(tokenizer: Any) -> dict[str, list[int]]:
    """Return the token ids of each of GOLDEN_TEXTS."""
    return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in GOLDEN_TEXTS}


def require_golden(golden: dict[str, list[int]], where: Path | str) -> None:
    """Check that the tokenizer in folder `where` encodes each golden text to its recorded ids.

    Raises:
        UserError: a text gets different ids, or the tokenizer cannot be loaded.
    """
    if not golden:
        return
    tokenizer = open_tokenizer(Path(where))
    for text, ids in golden.items():
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(
                f"tokenizer {where} encodes {text[:24]!r} differently than when the shards were made; "
                "install the version of `tokenizers` used then, or rebuild the dataset"
            )
