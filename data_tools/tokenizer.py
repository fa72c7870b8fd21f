"""Byte-level BPE: training a tokenizer, and loading one with what the shards must know of it."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.sources import find_documents
from fusiontree.console import progress_bar
from fusiontree.data.format import TokenizerInfo, tokenizer_fingerprint
from fusiontree.errors import UserError
from fusiontree.files import refuse_existing, staged_folder

EOS, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_SMALLEST = 256 + 2  # every byte, and the special tokens


def train_tokenizer(
    inputs: Sequence[Path],
    vocab_size: int,
    output: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train byte-level BPE on all documents and write a folder that Hugging Face's AutoTokenizer loads.

    Returns the figures: documents, bytes of text, vocab_size reached (a small corpus may not fill it), fingerprint,
    seconds, skipped inputs. The same documents give the same files.

    Raises:
        UserError: nothing to train on, `vocab_size` below 258, or `output` holds something and not `overwrite`.
    """
    started = time.perf_counter()
    if vocab_size < _SMALLEST:
        raise UserError(f"vocab size {vocab_size} is too small: 256 bytes and 2 special tokens need {_SMALLEST}")
    refuse_existing(output, overwrite, marker="tokenizer.json")
    documents, skipped = find_documents(inputs, include, exclude)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every text can be encoded
        show_progress=False,
    )
    with progress_bar() as bar:
        task = bar.add_task("train tokenizer", total=len(documents), note="")

        def texts() -> Iterator[str]:
            for document in documents:
                yield document.text()
                bar.advance(task)
            bar.update(task, note="learning merges")

        tokenizer.train_from_iterator(texts(), trainer, length=len(documents))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": int(1e30),  # Hugging Face's "no limit": context is the model's affair
        "clean_up_tokenization_spaces": False,
    }
    with staged_folder(output, overwrite, marker="tokenizer.json") as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _, info = load_tokenizer(folder)
    return {
        "documents": len(documents),
        "bytes": sum(document.size for document in documents),
        "vocab_size": info.vocab_size,
        "fingerprint": info.fingerprint,
        "seconds": time.perf_counter() - started,
        "skipped": [asdict(entry) for entry in skipped],
    }


def load_tokenizer(folder: Path) -> tuple[Tokenizer, TokenizerInfo]:
    """Load a Hugging Face tokenizer folder for building data.

    Text is data: a special token spelled out in a document is encoded as its characters, never as the token. A
    tokenizer without a padding token pads with its end-of-document token.

    Raises:
        UserError: a file is missing or unreadable, or there is no end-of-document token.
    """
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            raise UserError(f"tokenizer folder {folder} holds no {name}; make one with `fusiontree data tokenizer`")
    try:
        content = (folder / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        eos, pad = (_token_id(tokenizer, config.get(name)) for name in ("eos_token", "pad_token"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"tokenizer folder {folder} cannot be read ({error}); train or download it again") from None
    if eos is None:
        raise UserError(f"{folder / 'tokenizer_config.json'} names no eos_token of the vocabulary; add one")
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    fingerprint = tokenizer_fingerprint(folder)
    return tokenizer, TokenizerInfo(fingerprint, vocab_size, eos, eos if pad is None else pad)


def _token_id(tokenizer: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    """The id of a token as tokenizer_config.json spells it: a string, or an object with its content."""
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else tokenizer.token_to_id(text)
