"""Verification: every byte of a dataset against what the manifest and the indexes say of it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.tokenizer import load_tokenizer
from fusiontree.console import progress_bar
from fusiontree.data.format import Manifest, Shard, ShardInfo, index_path, index_shard
from fusiontree.errors import RunError, UserError


def verify(folder: Path) -> dict[str, Any]:
    """Check a dataset folder: {shards, rows, tokens, problems}, the problems one line each, naming shard and row.

    Raises:
        UserError: `folder` is no dataset (it has no manifest).
    """
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        if not (folder / "manifest.json").is_file():
            raise
        return {"shards": 0, "rows": 0, "tokens": 0, "problems": [str(error)]}
    infos = [info for shards in manifest.splits.values() for info in shards]
    problems = [*_unlisted(folder, manifest), *_totals(folder, manifest), *_tokenizer(folder, manifest)]
    with progress_bar() as bar:
        task = bar.add_task("verify", total=len(infos), note="")
        for info in infos:
            problems += _shard(folder, info, manifest)
            bar.update(task, advance=1, note=f"{len(problems)} problems")
    return {
        "shards": len(infos),
        "rows": sum(info.rows for info in infos),
        "tokens": sum(info.tokens for info in infos),
        "problems": problems,
    }


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {folder / info.name for shards in manifest.splits.values() for info in shards}
    listed |= {index_path(path) for path in listed}
    for split in manifest.splits:
        for path in sorted((folder / split).glob("*")):
            if path not in listed:
                yield f"{path.relative_to(folder)}: not in the manifest"


def _totals(folder: Path, manifest: Manifest) -> Iterator[str]:
    if json.loads((folder / "manifest.json").read_text(encoding="utf-8")) != manifest.to_json():
        yield "manifest.json: its totals are not the sums over its shards"


def _tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        _, info = load_tokenizer(folder / "tokenizer")
        manifest.require_tokenizer(info.fingerprint, folder / "tokenizer")
    except UserError as error:
        yield f"tokenizer: {error}"


def _shard(folder: Path, info: ShardInfo, manifest: Manifest) -> Iterator[str]:
    try:
        shard = Shard(folder, info, manifest)
    except UserError as error:
        yield f"{info.name}: {error}"
        return
    for row in range(info.rows):
        try:
            tokens, ends = shard.read(row)
        except RunError:
            yield f"{info.name}: row {row}: checksum differs"
            continue
        yield from (f"{info.name}: row {row}: {fault}" for fault in _row(tokens, ends, shard, row, manifest))
    with open(shard.path, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != info.sha256:
            yield f"{info.name}: sha256 differs from the manifest's"
            return
    # the shard is as it was written, so whatever disagrees now is the index or the manifest
    try:
        index, documents = index_shard(shard.path)
    except RunError as error:
        yield f"{info.name}: {error}"
        return
    if len(index) == info.rows:
        for differing in np.flatnonzero(index != shard.index):
            yield f"{info.name}: row {differing}: its index entry differs from the shard"
    counted = {"rows": len(index), "tokens": int(index["valid"].sum(dtype=np.int64)), "documents": documents}
    for name, number in counted.items():
        if number != getattr(info, name):
            yield f"{info.name}: has {number} {name}, the manifest says {getattr(info, name)}"


def _row(tokens: np.ndarray, ends: np.ndarray, shard: Shard, row: int, manifest: Manifest) -> Iterator[str]:
    if len(tokens) and (highest := int(tokens.max())) >= manifest.vocab_size:
        yield f"token {highest} is not below the vocabulary size {manifest.vocab_size}"
    bounds = np.abs(ends)
    if not len(ends) or (np.diff(bounds, prepend=0) <= 0).any() or bounds[-1] != manifest.row_len:
        yield f"segment ends do not ascend to the row's length {manifest.row_len}"
    elif int(np.diff(bounds, prepend=0)[ends > 0].sum()) != shard.index["valid"][row]:
        yield "the index counts other valid tokens than the segment ends do"
