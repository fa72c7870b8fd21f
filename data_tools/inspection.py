"""Inspection of a dataset: totals, and the documents of one row."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.tokenizers import load_tokenizer
from fusiontree.data.format import Dataset, Manifest

_SHOWN_TOKENS = 32


def describe(folder: Path) -> dict[str, Any]:
    """Return a dataset's row format, tokenizer, skipped inputs, and the shards, rows, tokens and padding of each split.

    Raises:
        UserError: `folder` is not a dataset.
    """
    manifest = Manifest.load(folder)
    tokenizer = asdict(manifest.tokenizer)
    tokenizer["golden_samples"] = len(tokenizer.pop("golden"))
    splits = {}
    for split in manifest.splits:
        totals = manifest.totals(split)
        capacity = totals["rows"] * manifest.row_len
        splits[split] = totals | {"padding": 1 - totals["tokens"] / capacity if capacity else 0.0}
    return {
        "row_len": manifest.row_len,
        "dtype": manifest.dtype,
        "source": manifest.source,
        "tokenizer": tokenizer,
        "splits": splits,
        "skipped": manifest.skipped,
    }


def show_row(folder: Path, row: int, split: str = "train", tokenizer: Path | None = None) -> dict[str, Any]:
    """Return a packed row: {split, row, shard, shard_row, valid_tokens, documents}.

    Each document has id, start, length, offset (all in tokens) and `text`, its first 32 tokens decoded.

    Args:
        folder: the dataset.
        row: number of the row in the split.
        split: train or validation.
        tokenizer: a tokenizer folder; None: the one in the dataset, or no decoding (`text` is None) without one.

    Raises:
        UserError: the dataset, split or row does not exist, or the tokenizer is not that of the shards.
        RunError: the row is damaged.
    """
    dataset = Dataset(folder, split)
    shard, shard_row = dataset.place(row)
    tokens, _ = dataset.row(row)
    bundled = folder / "tokenizer"
    tokenizer = tokenizer or (bundled if bundled.is_dir() else None)
    decoder = None
    if tokenizer is not None:
        decoder, info = load_tokenizer(tokenizer)
        dataset.manifest.require_tokenizer(info.fingerprint, tokenizer)
    documents = []
    for span in dataset.spans(row):
        head = tokens[span.start : span.start + min(span.length, _SHOWN_TOKENS)].tolist()
        documents.append(asdict(span) | {"text": decoder.decode(head, skip_special_tokens=False) if decoder else None})
    return {
        "split": split,
        "row": row,
        "shard": shard.info.name,
        "shard_row": shard_row,
        "valid_tokens": sum(document["length"] for document in documents),
        "documents": documents,
    }
