"""Tokenizer folders: training of byte-level BPE, and loading of any tokenizer with the facts that shards record."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.inputs import TextFile, find_files
from data_tools.options import InputOptions
from data_tools.readers import Rejected, extract_text, find_fault, read_records, require_readers
from data_tools.skipped import SkipReport
from fusiontree.console import progress_bar
from fusiontree.data.format import TokenizerInfo, tokenizer_fingerprint
from fusiontree.data.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TextTokenizer,
    golden_samples,
    load_text_tokenizer,
    named_token,
    plain_config,
    read_json,
    write_config,
)
from fusiontree.errors import UserError
from fusiontree.files import refuse_existing, staged_folder

EOS, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1
_MIN_VOCAB_SIZE = 256 + 2  # every byte, and the special tokens


def train_tokenizer(
    inputs: Sequence[Path | str],
    vocab_size: int,
    output: Path,
    options: InputOptions | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train byte-level BPE on all documents and write a folder that Hugging Face's AutoTokenizer loads.

    The same documents give the same files.

    Args:
        inputs: files, folders or glob patterns, see `find_files`.
        vocab_size: tokens, including the two special ones; a small corpus may give fewer.
        output: the tokenizer folder.
        options: of the inputs.
        overwrite: replace an existing tokenizer folder.

    Returns:
        The figures: output, documents, bytes of text, vocab_size reached, fingerprint, seconds, skipped inputs.

    Raises:
        UserError: no document was found, `vocab_size` is below 258, or `output` exists and `overwrite` is false.
    """
    started = time.perf_counter()
    options = options or InputOptions()
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size is {vocab_size}; it must be at least {_MIN_VOCAB_SIZE}: 256 bytes and 2 special tokens"
        )
    refuse_existing(output, overwrite, marker=TOKENIZER_FILE)
    files, skipped = find_files(inputs, options)
    require_readers(files)
    report = SkipReport()
    report.add_inputs(skipped)
    size = 0
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # makes every text encodable
        show_progress=False,
    )
    with progress_bar(in_bytes=True) as bar:
        task = bar.add_task("train tokenizer", total=sum(file.size for file in files), note="")

        def texts() -> Iterator[str]:
            nonlocal size
            for file in files:
                for text in _texts(file, options, report):
                    size += len(text.encode())
                    yield text
                bar.advance(task, file.size)
            bar.update(task, note="learning merges")

        tokenizer.train_from_iterator(texts(), trainer)
    if not report.documents:
        raise UserError(f"no documents in {', '.join(map(str, inputs))} ({report.why_empty()})")
    with staged_folder(output, overwrite, marker=TOKENIZER_FILE) as folder:
        tokenizer.save(str(folder / TOKENIZER_FILE))
        write_config(folder, plain_config(EOS, PAD))
        _, info = load_tokenizer(folder)
    return {
        "output": str(output),
        "documents": report.documents,
        "bytes": size,
        "vocab_size": info.vocab_size,
        "fingerprint": info.fingerprint,
        "seconds": time.perf_counter() - started,
        "skipped": report.to_json(),
    }


def _texts(file: TextFile, options: InputOptions, report: SkipReport) -> Iterator[str]:
    """Yield the texts of a file; record the rest in `report`."""
    for record in read_records(file, options, find_fault(file, options)):
        try:
            text = extract_text(record, options)
        except Rejected as rejected:
            report.add_record(record, str(rejected))
        else:
            report.documents += 1
            yield text


def load_tokenizer(folder: Path, eos: str | None = None) -> tuple[Tokenizer, TokenizerInfo]:
    """Load a tokenizer folder and the facts that shards record; see `load_text_tokenizer`."""
    text_tokenizer = load_text_tokenizer(folder, eos)
    return text_tokenizer.tokenizer, describe_tokenizer(text_tokenizer, folder)


def describe_tokenizer(text_tokenizer: TextTokenizer, folder: Path) -> TokenizerInfo:
    """Return the facts that shards record; the end-of-document token also pads if the folder names no padding token."""
    tokenizer = text_tokenizer.tokenizer
    eos_id = tokenizer.token_to_id(text_tokenizer.eos)
    pad = named_token(folder, "pad_token")
    pad_id = None if pad is None else tokenizer.token_to_id(pad[1])
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    pad_id = eos_id if pad_id is None else pad_id
    return TokenizerInfo(tokenizer_fingerprint(folder), vocab_size, eos_id, pad_id, golden_samples(tokenizer))


def copy_tokenizer(source: Path, target: Path, eos: str | None) -> None:
    """Copy tokenizer.json, with a configuration that names the end-of-document and padding token.

    No other file of the folder is copied.

    Raises:
        UserError: see `load_text_tokenizer`.
    """
    tokenizer, info = load_tokenizer(source, eos)
    eos_token, pad_token = (str(tokenizer.id_to_token(number)) for number in (info.eos_id, info.pad_id))
    config = plain_config(eos_token, pad_token, read_json(source / TOKENIZER_CONFIG))
    target.mkdir(exist_ok=True)
    (target / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
    write_config(target, config)
