"""Verification of a dataset: shards and indexes against the manifest, and the manifest against the tokenizer."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.options import require_workers
from data_tools.tokenizers import load_tokenizer
from data_tools.workers import process_pool
from fusiontree.console import progress_bar
from fusiontree.data.format import MANIFEST, Manifest, ShardInfo, index_path, read_index, tokenizer_fingerprint
from fusiontree.data.shard_scan import ShardScan, scan_shard
from fusiontree.errors import UserError, short_cause


def verify(folder: Path, workers: int = 1) -> dict[str, Any]:
    """Check every byte of a dataset folder.

    Args:
        folder: the dataset.
        workers: processes that read shards.

    Returns:
        {shards, rows, tokens, bytes, problems}; each problem is one line that names the shard and the row.

    Raises:
        UserError: `folder` has no manifest.
    """
    require_workers(workers)
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        if not (folder / MANIFEST).is_file():
            raise
        return {"shards": 0, "rows": 0, "tokens": 0, "bytes": 0, "problems": [str(error)]}
    infos = [info for shards in manifest.splits.values() for info in shards]
    problems = [
        *_unlisted_files(folder, manifest),
        *_wrong_totals(folder, manifest),
        *_tokenizer_mismatches(folder, manifest),
    ]
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
    """Scan the named shards of a folder and return the scans in order."""
    require_workers(workers)
    paths = [folder / name for name in names]
    scans = []
    with process_pool(workers) as pool, progress_bar(in_bytes=True) as bar:
        task = bar.add_task("read", total=sum(path.stat().st_size for path in paths), note="")
        for scan in pool.map(scan_shard, paths) if pool else map(scan_shard, paths):
            scans.append(scan)
            bar.advance(task, scan.bytes)
    return scans


def _unlisted_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {folder / info.name for shards in manifest.splits.values() for info in shards}
    listed |= {index_path(path) for path in listed}
    for split in manifest.splits:
        for path in sorted((folder / split).glob("*")):
            if path not in listed:
                yield f"{path.relative_to(folder)}: not in the manifest"


def _wrong_totals(folder: Path, manifest: Manifest) -> Iterator[str]:
    if json.loads((folder / MANIFEST).read_text(encoding="utf-8")) != manifest.to_json():
        yield "manifest.json: the totals are not the sums over the shards"


def _tokenizer_mismatches(folder: Path, manifest: Manifest) -> Iterator[str]:
    bundled = folder / "tokenizer"
    try:
        manifest.require_tokenizer(tokenizer_fingerprint(bundled), bundled)
        _, info = load_tokenizer(bundled)
    except UserError as error:
        yield f"tokenizer: {error}"
        return
    for name in ("eos_id", "pad_id", "vocab_size"):
        recorded, found = getattr(manifest.tokenizer, name), getattr(info, name)
        if recorded != found:
            yield f"manifest.json: {name} is {recorded}, but {found} in {bundled}"


def _check(folder: Path, row_len: int, dtype: str, vocab_size: int, info: ShardInfo) -> list[str]:
    """Return the problems of a shard and its index, without consequential ones."""
    path = folder / info.name
    problems: dict[str, None] = {}  # an ordered set: shard and index can have the same problem
    index = None
    try:
        index = read_index(path)
    except UserError as error:
        problems[str(error)] = None
    try:
        scan = scan_shard(path)
    except FileNotFoundError:
        return [f"{info.name}: missing"]
    except OSError as error:
        return [f"{info.name}: cannot be read ({short_cause(error)})"]
    for problem in (*_content_faults(scan, row_len, dtype), *_mismatches(scan, index, info, vocab_size)):
        problems[problem] = None
    return [f"{info.name}: {problem}" for problem in problems]


def _content_faults(scan: ShardScan, row_len: int, dtype: str) -> Iterator[str]:
    """Yield structural faults, and row shapes that differ from the dataset's."""
    yield from scan.faults
    for other_len, other_dtype in scan.shapes - {(row_len, dtype)}:
        yield f"rows have {other_len} tokens of {other_dtype}, but {row_len} of {dtype} in the manifest"


def _mismatches(scan: ShardScan, index: np.ndarray | None, info: ShardInfo, vocab_size: int) -> Iterator[str]:
    """Yield the differences from the index and from the manifest."""
    if index is not None:
        yield from _index_mismatches(scan, index, info)
    yield from manifest_mismatches(scan, info, vocab_size)


def _index_mismatches(scan: ShardScan, index: np.ndarray, info: ShardInfo) -> Iterator[str]:
    changed = scan.sha256 != info.sha256
    if len(index) != info.rows:
        yield f"the index lists {len(index)} rows, but the manifest {info.rows}"
    else:
        for row, entry in zip(scan.row_numbers, scan.index, strict=True):
            if row < len(index) and index[row] != entry:
                # a shard with the manifest's SHA-256 is intact, so the index is wrong
                yield f"row {row}: checksum differs" if changed else f"row {row}: index entry differs from the shard"


def manifest_mismatches(scan: ShardScan, info: ShardInfo, vocab_size: int) -> Iterator[str]:
    """Yield the differences between a shard and its entry in the manifest, one line each."""
    if scan.bytes != info.bytes:
        yield f"has {scan.bytes} bytes, but {info.bytes} in the manifest"
    if scan.sha256 != info.sha256:
        yield "SHA-256 differs from the manifest: the shard was changed after it was written"
        return
    yield from scan.out_of_vocabulary(vocab_size)
    found = scan.info(info.name)
    for name in ("rows", "tokens", "documents"):
        if getattr(found, name) != getattr(info, name):
            yield f"has {getattr(found, name)} {name}, but {getattr(info, name)} in the manifest"
    if found.index_sha256 != info.index_sha256:
        yield "the manifest lists another index than the shard's"
