"""Tokenizer folders: training of byte-level BPE, and loading of any tokenizer with the facts that shards record."""

import json
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
from fusiontree.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, golden_samples, open_tokenizer
from fusiontree.errors import UserError, short_cause
from fusiontree.files import refuse_existing, staged_folder

EOS, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1
_MIN_VOCAB_SIZE = 256 + 2  # every byte, and the special tokens
# end-of-document tokens of common model families, tried if no configuration file names one
_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|endofdocument|>", "[EOS]")


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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": int(1e30),  # no limit, as Hugging Face writes it: the context length belongs to the model
        "clean_up_tokenization_spaces": False,
    }
    with staged_folder(output, overwrite, marker=TOKENIZER_FILE) as folder:
        tokenizer.save(str(folder / TOKENIZER_FILE))
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
    """Load a Hugging Face tokenizer folder for building data, see `open_tokenizer`.

    The end-of-document token is `eos`, else the `eos_token` of tokenizer_config.json or special_tokens_map.json, else
    the only well-known end-of-document token in the vocabulary. It also pads if the tokenizer has no padding token.

    Raises:
        UserError: a file is missing or unreadable, or the end-of-document token is unknown or ambiguous.
    """
    tokenizer = open_tokenizer(folder)
    config, special = (_read_json(folder / name) for name in (TOKENIZER_CONFIG, "special_tokens_map.json"))
    eos_id = tokenizer.token_to_id(_eos_token(tokenizer, folder, eos, config, special))
    pad = _content(config.get("pad_token")) or _content(special.get("pad_token"))
    pad_id = None if pad is None else tokenizer.token_to_id(pad)
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    golden = golden_samples(tokenizer)
    pad_id = eos_id if pad_id is None else pad_id
    return tokenizer, TokenizerInfo(tokenizer_fingerprint(folder), vocab_size, eos_id, pad_id, golden)


def copy_tokenizer(source: Path, target: Path, eos: str | None) -> None:
    """Copy tokenizer.json and the configuration, and set the end-of-document and padding token in the configuration.

    The other files of the folder are not copied.

    Raises:
        UserError: see `load_tokenizer`.
    """
    tokenizer, info = load_tokenizer(source, eos)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | _read_json(source / TOKENIZER_CONFIG)
    target.mkdir(exist_ok=True)
    (target / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
    pad = {"pad_token": info.pad_id} if info.pad_id != info.eos_id else {}
    for name, number in ({"eos_token": info.eos_id} | pad).items():
        if (token := tokenizer.id_to_token(number)) != _content(config.get(name)):
            config[name] = token
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _eos_token(
    tokenizer: Tokenizer, folder: Path, given: str | None, config: dict[str, Any], special: dict[str, Any]
) -> str:
    """Return the end-of-document token; it is in the vocabulary."""
    for where, token in (
        ("--eos", given),
        (folder / TOKENIZER_CONFIG, _content(config.get("eos_token"))),
        (folder / "special_tokens_map.json", _content(special.get("eos_token"))),
    ):
        if token is not None:
            if tokenizer.token_to_id(token) is None:
                raise UserError(f"{where} names {token!r}, which is not in the vocabulary; {_eos_advice(tokenizer)}")
            return token
    known = [token for token in _KNOWN_EOS if tokenizer.token_to_id(token) is not None]
    if len(known) != 1:
        raise UserError(f"tokenizer folder {folder} names no end-of-document token; {_eos_advice(tokenizer)}")
    return known[0]


def _eos_advice(tokenizer: Tokenizer) -> str:
    """Return the remedy of an error: --eos, with candidates from the vocabulary."""
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    candidates = [token for token in _KNOWN_EOS if tokenizer.token_to_id(token) is not None]
    candidates += [token for token in special if token not in candidates]
    return f"give --eos TOKEN, for example {' or '.join(candidates[:8])}" if candidates else "give --eos TOKEN"


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Return the text of a token, which configurations give as a string or as an object with `content`."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({short_cause(error)}); train or download the tokenizer again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read (not a JSON object); train or download the tokenizer again")
    return values
