"""The exported tokenizer, proven to give the ids of training through transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.data.tokenizer import (
    GOLDEN_TEXTS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TextTokenizer,
    load_text_tokenizer,
    named_token,
    plain_config,
    read_json,
    write_config,
)
from fusiontree.errors import RunError, typed_cause
from fusiontree.export.parity import isolated_code
from fusiontree.files import write_atomic

# next to the golden texts: spaces and line ends at both ends, long white space, control characters, digits, scripts
_HARD_TEXTS = (
    *(" ", "  ", "\n", "\t", " a", "a ", "  a  b  ", "\n\na\n", "a\r\nb\r", "\ta\t", "a" * 3000, "\u00a0a\u00a0"),
    *(" " * 1000, "\n" * 500, "\t" * 200, " \n" * 200, "".join(map(chr, range(32))), "\x7f\x80\x85\x9f\ufffd\ufeff"),
    *(
        "0123456789",
        "3.14159e-26",
        "1 22 333 4444 55555 666666",
        "v1.2.3",
        "$1,000.00",
        "2026-11-29T01:02:03Z",
        "٣٤٥६७",
    ),
    *(
        "東京都に住んでいます。",
        "我们今天去北京。",
        "한국어 띄어쓰기",
        "Привет, мир!",
        "שלום עולם",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
    ),
    *(
        "สวัสดีชาวโลก",
        "Ångström e\u0301 ﬁ ① ½",
        "I'm we've they'LL don't",
        "can't've",
        "«l'été»",
        "🏳️‍🌈👩‍👩‍👧 🇫🇷",
        "▁a ▁▁ b",
        "Ġa Ċ",
    ),
    *(
        "a.b(c)[d]{e}",
        "x->y; !=, ===",
        "snake_case camelCase",
        "https://example.org/?q=1&r=%20",
        "</b> <s > <|x|>",
        "##a @@ </w>",
    ),
)
_PIECE = 4096  # characters of a real text that are encoded at once


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a run to an export, as training used it: its post-processor adds no token.

    Raises:
        UserError: see `load_text_tokenizer`.
    """
    tokenizer, named = load_text_tokenizer(source), named_token(source, "pad_token")
    # transformers makes any token that is named here a special one, which is never text
    pad = named[1] if named is not None and named[1] in tokenizer.special_tokens else tokenizer.eos
    config = plain_config(tokenizer.eos, pad, read_json(source / TOKENIZER_CONFIG))
    write_atomic(folder / TOKENIZER_FILE, tokenizer.definition)
    write_config(folder, config)


def prove_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """Compare the tokenizer that transformers loads from `folder` with the one that training used.

    The texts are the folder's own code and prose, hard cases, every token of the vocabulary and every special token.
    Text must get equal ids, and equal ids must decode to equal text.

    Args:
        source: the run's tokenizer.
        folder: the export.

    Returns:
        The number of `texts` and `tokens` compared.

    Raises:
        RunError: the two differ, or transformers cannot load the tokenizer.
    """
    from transformers import AutoTokenizer

    trained = load_text_tokenizer(source)
    with isolated_code():
        try:
            exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        except Exception as error:  # of any library below transformers
            raise RunError(
                f"export failed its parity proof: transformers cannot load the tokenizer ({typed_cause(error)}); "
                "nothing was written"
            ) from None
    vocabulary = trained.tokenizer.get_vocab(with_added_tokens=True)
    if exported.get_vocab() != vocabulary:
        raise _failure(exported, "has another vocabulary")
    if exported.eos_token != trained.eos:
        raise _failure(exported, f"has the end-of-document token {exported.eos_token!r}, not {trained.eos!r}")
    texts = tokens = 0
    for text in (
        *GOLDEN_TEXTS,
        *_HARD_TEXTS,
        *_real_texts(folder),
        *_vocabulary_texts(trained, sorted(vocabulary.values())),
    ):
        ids = trained.tokenizer.encode(text, add_special_tokens=False).ids
        spells = any(token in text for token in trained.special_tokens)
        # transformers finds special tokens in text unless told otherwise, as fine-tuning needs it
        if (exported(text, split_special_tokens=True) if spells else exported(text)).input_ids != ids:
            raise _failure(exported, f"encodes {text[:40]!r} differently than training")
        for skip in (False, True):
            if exported.decode(ids, skip_special_tokens=skip) != trained.tokenizer.decode(
                ids, skip_special_tokens=skip
            ):
                raise _failure(exported, f"decodes the tokens of {text[:40]!r} differently than training")
        texts, tokens = texts + 1, tokens + len(ids)
    return {"texts": texts, "tokens": tokens}


def _failure(exported: Any, what: str) -> RunError:
    return RunError(
        f"export failed its parity proof: the tokenizer that transformers loads ({type(exported).__name__}) {what}; "
        "nothing was written"
    )


def _real_texts(folder: Path) -> Iterator[str]:
    """Yield the code and prose of an exported folder in pieces."""
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.md")]):
        text = path.read_text(encoding="utf-8")
        yield from (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def _vocabulary_texts(trained: TextTokenizer, ids: list[int]) -> Iterator[str]:
    """Yield texts that contain every token and every added token."""
    decode, added = trained.tokenizer.decode, trained.tokenizer.get_added_tokens_decoder().values()
    names = [token.content for token in added]
    for start in range(0, len(ids), _PIECE):
        yield "".join(decode([number], skip_special_tokens=True) for number in ids[start : start + _PIECE])
    yield trained.eos
    for start in range(0, len(names), 100):
        yield "\n".join(f" {name} a{name}b{name}{name}" for name in names[start : start + 100])
