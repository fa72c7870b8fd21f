"""Verification: every byte of the shards and indexes against the manifest, and the manifest against the tokenizer."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.tokenizers import load_tokenizer
from data_tools.workers import process_pool
from fusiontree.console import progress_bar
from fusiontree.data.format import MANIFEST, Manifest, ShardInfo, index_path, read_index, tokenizer_fingerprint
from fusiontree.data.shard_scan import ShardScan, scan_shard
from fusiontree.errors import UserError


def verify(folder: Path, workers: int = 1) -> dict[str, Any]:
    """Check a dataset folder: {shards, rows, tokens, bytes, problems}, the problems one line each, with shard and row.

    Args:
        folder: the dataset.
        workers: processes that read shards.

    Raises:
        UserError: `folder` is no dataset (it has no manifest).
    """
    if workers < 1:
        raise UserError(f"workers {workers} is too few; give at least 1")
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        if not (folder / MANIFEST).is_file():
            raise
        return {"shards": 0, "rows": 0, "tokens": 0, "bytes": 0, "problems": [str(error)]}
    infos = [info for shards in manifest.splits.values() for info in shards]
    problems = [*_unlisted(folder, manifest), *_totals(folder, manifest), *_tokenizer(folder, manifest)]
    size = sum(info.bytes for info in infos)
    check = functools.partial(_check, folder, manifest.row_len, manifest.dtype, manifest.vocab_size)
    with process_pool(workers) as pool, progress_bar(in_bytes=True) as bar:
        task = bar.add_task("verify", total=size, note="")
        for info, found in zip(infos, pool.map(check, infos) if pool else map(check, infos), strict=True):
            problems += found
            bar.update(task, advance=info.bytes, note=f"{len(problems)} problems")
    return {
        "shards": len(infos),
        "rows": sum(info.rows for info in infos),
        "tokens": sum(info.tokens for info in infos),
        "bytes": size,
        "problems": problems,
    }


def scan_all(folder: Path, names: list[str], workers: int) -> list[ShardScan]:
    """ShardScan the shards of a folder, in order."""
    if workers < 1:
        raise UserError(f"workers {workers} is too few; give at least 1")
    paths = [folder / name for name in names]
    scans = []
    with process_pool(workers) as pool, progress_bar(in_bytes=True) as bar:
        task = bar.add_task("read", total=sum(path.stat().st_size for path in paths), note="")
        for scan in pool.map(scan_shard, paths) if pool else map(scan_shard, paths):
            scans.append(scan)
            bar.advance(task, scan.bytes)
    return scans


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {folder / info.name for shards in manifest.splits.values() for info in shards}
    listed |= {index_path(path) for path in listed}
    for split in manifest.splits:
        for path in sorted((folder / split).glob("*")):
            if path not in listed:
                yield f"{path.relative_to(folder)}: not in the manifest"


def _totals(folder: Path, manifest: Manifest) -> Iterator[str]:
    if json.loads((folder / MANIFEST).read_text(encoding="utf-8")) != manifest.to_json():
        yield "manifest.json: its totals are not the sums over its shards"


def _tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    own = folder / "tokenizer"
    try:
        manifest.require_tokenizer(tokenizer_fingerprint(own), own)
        _, info = load_tokenizer(own)
    except UserError as error:
        yield f"tokenizer: {error}"
        return
    for name in ("eos_id", "pad_id", "vocab_size"):
        said, found = getattr(manifest.tokenizer, name), getattr(info, name)
        if said != found:
            yield f"manifest.json: its {name} is {said}, that of {own} {found}"


def _check(folder: Path, row_len: int, dtype: str, vocab_size: int, info: ShardInfo) -> list[str]:
    """The problems of a shard and its index, without those that follow from others."""
    path = folder / info.name
    problems: dict[str, None] = {}  # a set in order: the shard and its index may tell of the same
    index = None
    try:
        index = read_index(path)
    except UserError as error:
        problems[str(error)] = None
    try:
        scan = scan_shard(path)
    except FileNotFoundError:
        return [f"{info.name}: it is missing"]
    except OSError as error:
        return [f"{info.name}: it cannot be read ({error.strerror})"]
    for problem in (*_content(scan, row_len, dtype), *_against(scan, index, info, vocab_size)):
        problems[problem] = None
    return [f"{info.name}: {problem}" for problem in problems]


def _content(scan: ShardScan, row_len: int, dtype: str) -> Iterator[str]:
    """What no shard of this dataset may hold."""
    yield from scan.faults
    for other_len, other_dtype in scan.shapes - {(row_len, dtype)}:
        yield f"its rows are {other_len} tokens of {other_dtype}, the manifest says {row_len} of {dtype}"


def _against(scan: ShardScan, index: np.ndarray | None, info: ShardInfo, vocab_size: int) -> Iterator[str]:
    """What differs from the index and from the manifest."""
    if index is not None:
        yield from _against_index(scan, index, info)
    yield from faults_against_manifest(scan, info, vocab_size)


def _against_index(scan: ShardScan, index: np.ndarray, info: ShardInfo) -> Iterator[str]:
    changed = scan.sha256 != info.sha256
    if len(index) != info.rows:
        yield f"its index lists {len(index)} rows, the manifest {info.rows}"
    else:
        for row, entry in zip(scan.row_numbers, scan.index, strict=True):
            if row < len(index) and index[row] != entry:
                # of a shard that is as it was written, whatever disagrees is the index
                yield (
                    f"row {row}: checksum differs" if changed else f"row {row}: its index entry differs from the shard"
                )


def faults_against_manifest(scan: ShardScan, info: ShardInfo, vocab_size: int) -> Iterator[str]:
    """What differs from what the manifest says of a shard, a line each."""
    if scan.bytes != info.bytes:
        yield f"it has {scan.bytes} bytes, the manifest says {info.bytes}"
    if scan.sha256 != info.sha256:
        yield "sha256 differs from the manifest's: it was changed since it was written"
        return
    yield from scan.out_of_vocabulary(vocab_size)
    found = scan.info(info.name)
    for name in ("rows", "tokens", "documents"):
        if getattr(found, name) != getattr(info, name):
            yield f"has {getattr(found, name)} {name}, the manifest says {getattr(info, name)}"
    if found.index_sha256 != info.index_sha256:
        yield "calls for another index than the manifest lists"
