"""The invariants of a dataset, checked where its manifest, an index or a row is read (docs/format.md).

Checksums prove that bytes are those that were written. These checks prove that what was written is a dataset, so that
nothing after them can fail on its values. Each function returns one fault without its place, "" if there is none.
"""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fusiontree.data import segments
from fusiontree.data.packing import check_row_len
from fusiontree.errors import UserError, short_cause

if TYPE_CHECKING:
    from fusiontree.data.format import Manifest, ShardInfo

SPLITS = ("train", "validation")
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})/[0-9A-Za-z_-]{{1,200}}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_ROW = 1 << 30  # tokens; ends are int32
_LARGEST_VOCABULARY = {"uint16": 1 << 16, "uint32": 1 << 31}  # by token type


def find_manifest_fault(manifest: "Manifest") -> str:
    """Return the fault of a manifest whose fields have the right types."""
    return next(_manifest_faults(manifest), "")


def _manifest_faults(manifest: "Manifest") -> Iterator[str]:
    try:
        check_row_len(manifest.row_len)
    except UserError as error:
        yield short_cause(error)
    if manifest.row_len > _LONGEST_ROW:
        yield f"row_len {manifest.row_len} is above {_LONGEST_ROW}"
    yield from _tokenizer_faults(manifest)
    if unknown := sorted(set(manifest.splits) - set(SPLITS)):
        yield f"split {unknown[0]!r:.60} is neither train nor validation"
    for split, shards in manifest.splits.items():
        for shard in shards:
            if not _SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(f"{split}/"):
                yield f"{shard.name!r:.60} is not the name of a shard in {split}/"
            if fault := _shard_fault(shard, manifest.row_len):
                yield f"{shard.name}: {fault}"
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    if len(set(names)) < len(names):
        yield "a shard is listed twice"
    for entry in manifest.skipped:
        if not isinstance(entry, dict):
            yield "an entry of skipped is not an object"
        elif not isinstance(entry.get("path"), str) or not isinstance(entry.get("reason"), str):
            yield "an entry of skipped has no path or no reason"
        elif type(entry.get("count", 1)) is not int or not isinstance(entry.get("places", []), list):
            yield "an entry of skipped has no valid count or places"
    try:
        json.dumps(manifest.to_json(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        yield "it has a text that is not valid Unicode"


def _tokenizer_faults(manifest: "Manifest") -> Iterator[str]:
    tokenizer, largest = manifest.tokenizer, _LARGEST_VOCABULARY.get(manifest.dtype)
    if largest is None:
        yield f"dtype {manifest.dtype!r:.60} is neither uint16 nor uint32"
    elif not 1 <= tokenizer.vocab_size <= largest:
        yield f"vocab_size {_short(tokenizer.vocab_size)} is not from 1 to {largest}, the tokens of {manifest.dtype}"
    for name in ("eos_id", "pad_id"):
        if not 0 <= getattr(tokenizer, name) < tokenizer.vocab_size:
            yield f"{name} {_short(getattr(tokenizer, name))} is not below vocab_size {_short(tokenizer.vocab_size)}"
    for ids in tokenizer.golden.values():
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            yield "a golden text has ids that are not tokens"


def _shard_fault(shard: "ShardInfo", row_len: int) -> str:
    if not _SHA256.fullmatch(shard.sha256) or not _SHA256.fullmatch(shard.index_sha256):
        return "a sha256 is not 64 hexadecimal digits"
    for name, largest in (
        ("bytes", 1 << 62),
        ("rows", 1 << 32),
        ("tokens", shard.rows * row_len),
        ("documents", shard.rows * row_len),
    ):
        if not 0 <= (count := getattr(shard, name)) <= largest:
            return f"{name} {_short(count)} is not from 0 to {_short(largest)}"
    return ""


def find_index_fault(index: np.ndarray, shard: "ShardInfo", row_len: int, token_bytes: int) -> str:
    """Return the fault of a shard's index, dtype INDEX [rows].

    Args:
        index: the index.
        shard: the shard's entry in the manifest.
        row_len: tokens per row.
        token_bytes: bytes per token.
    """
    if len(index) != shard.rows:
        return f"it lists {len(index)} rows, but the manifest {shard.rows}"
    row_bytes = row_len * token_bytes
    end_bytes = index["segments"].astype(np.int64) * segments.ENDS.itemsize
    last_end = np.maximum(0, shard.bytes - end_bytes).astype(np.uint64)  # offsets compare as unsigned
    faults = {
        "its tokens are outside the shard": index["tokens"] > np.uint64(max(0, shard.bytes - row_bytes)),
        "its segment ends are outside the shard": index["ends"] > last_end,
        f"its segments are not from 1 to {row_len}": (index["segments"] < 1) | (index["segments"] > row_len),
        f"it has more than {row_len} tokens": index["valid"] > row_len,
    }
    for fault, found in faults.items():
        if found.any():
            return f"row {int(found.argmax())}: {fault}"
    if (tokens := int(index["valid"].astype(np.int64).sum())) != shard.tokens:
        return f"it lists {tokens} tokens, but the manifest {shard.tokens}"
    return ""


def find_row_fault(tokens: np.ndarray, ends: np.ndarray, valid: int, vocab_size: int) -> str:
    """Return the fault of a row: tokens [row_len] and segment ends, int32 [segments].

    Args:
        tokens: the tokens.
        ends: the segment ends.
        valid: tokens that are not padding, as in the index.
        vocab_size: largest token id + 1.
    """
    if fault := segments.find_fault(ends, len(tokens)):
        return fault
    if (found := segments.count_tokens(ends)) != valid:
        return f"has {found} tokens, but {valid} in the index"
    if (largest := int(tokens.max())) >= vocab_size:
        return f"has token {largest}, which is not below the vocabulary size {vocab_size}"
    return ""


def _short(number: Any) -> str:
    """Format a number of any size."""
    return str(number) if abs(number) < 1 << 64 else f"of {number.bit_length()} bits"
