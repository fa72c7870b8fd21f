"""Adopting shards whose index or manifest is lost: what is lost is made again from the tars, which are not touched."""

from pathlib import Path
from typing import Any

from data_tools.tokenizers import copy_tokenizer, load_tokenizer
from data_tools.verify import faults_against_manifest, scan_all
from fusiontree.data.format import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    has_index,
    index_path,
    read_index,
)
from fusiontree.data.shard_scan import ShardScan
from fusiontree.data.writer import write_index
from fusiontree.errors import UserError


def reindex(
    folder: Path, tokenizer: Path | None = None, eos: str | None = None, skip_damaged: bool = False, workers: int = 1
) -> dict[str, Any]:
    """Make the indexes of a dataset folder again from its shards, and the manifest if it is lost.

    A manifest that is there stays, and only the indexes that are not those it lists are made again, each from the shard
    that it lists. Without one, what the shards do not hold comes from the tokenizer folder; which inputs were skipped
    cannot be known again. A shard with anything wrong in it is named and never adopted.

    Args:
        folder: the dataset; the shards are SPLIT/*.tar.
        tokenizer: the one that made the shards, if the manifest is lost; None: the copy in the dataset folder. Copied
            there if none is.
        eos: the end-of-document token, see `load_tokenizer`.
        skip_damaged: adopt the sound shards though others are damaged; otherwise nothing is written then.
        workers: processes that read shards.

    Returns {shards, rows, tokens, bytes, adopted (whether anything was written), problems}, of the shards whose index
    was made again.

    Raises:
        UserError: no shards there, nothing is lost, or the tokenizer is not the one that made them.
    """
    if (folder / MANIFEST).is_file():
        if tokenizer is not None or eos is not None:
            raise UserError(f"{folder} has a manifest, which knows the tokenizer; leave --tokenizer and --eos out")
        return _reindex_listed(folder, skip_damaged, workers)
    names = [f"{split}/{path.name}" for split in SPLITS for path in sorted((folder / split).glob("*.tar"))]
    if not names:
        raise UserError(
            f"{folder} holds no {' and no '.join(f'{split}/*.tar' for split in SPLITS)}; nothing to reindex"
        )
    own = folder / "tokenizer"
    if tokenizer is None and not own.is_dir():
        raise UserError(f"{folder} holds no tokenizer; give the one that made the shards with --tokenizer DIR")
    _, info = load_tokenizer(tokenizer or own, eos)
    scans = dict(zip(names, scan_all(folder, names, workers), strict=True))
    problems = [f"{name}: {fault}" for name, scan in scans.items() for fault in _faults(folder / name, scan, info)]
    sound = {name: scan for name, scan in scans.items() if not any(line.startswith(f"{name}: ") for line in problems)}
    problems += _gaps(sound)
    adopted = bool(sound) and (skip_damaged or not problems)
    if adopted:
        _adopt(folder, sound, info)
        if not own.is_dir() or eos is not None:
            copy_tokenizer(tokenizer or own, own, eos)
    return _figures(sound, adopted, problems)


def _reindex_listed(folder: Path, skip_damaged: bool, workers: int) -> dict[str, Any]:
    """Make the indexes again that are not those of the manifest; see `reindex`."""
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        raise UserError(f"{error}, or remove it to reindex") from None
    infos = [info for shards in manifest.splits.values() for info in shards if not has_index(folder, info)]
    if not infos:
        raise UserError(
            f"{folder} has its manifest and every index; check it with `fusiontree data verify`, or remove the "
            "manifest to make it again"
        )
    there = [info for info in infos if (folder / info.name).is_file()]
    problems = [f"{info.name}: it is missing" for info in infos if info not in there]
    sound: dict[str, ShardScan] = {}
    for info, scan in zip(there, scan_all(folder, [info.name for info in there], workers), strict=True):
        faults = [*scan.faults, *faults_against_manifest(scan, info, manifest.vocab_size)]
        problems += [f"{info.name}: {fault}" for fault in faults]
        if not faults:
            sound[info.name] = scan
    adopted = bool(sound) and (skip_damaged or not problems)
    if adopted:
        for name, scan in sound.items():
            write_index(folder / name, scan.index)
    return _figures(sound, adopted, problems)


def _figures(sound: dict[str, ShardScan], adopted: bool, problems: list[str]) -> dict[str, Any]:
    return {
        "shards": len(sound),
        "rows": sum(len(scan.entries) for scan in sound.values()),
        "tokens": sum(scan.info(name).tokens for name, scan in sound.items()),
        "bytes": sum(scan.bytes for scan in sound.values()),
        "adopted": adopted,
        "problems": problems,
    }


def _faults(path: Path, scan: ShardScan, info: TokenizerInfo) -> list[str]:
    """All that speaks against adopting a shard."""
    faults = list(scan.faults)
    made_by = {tokenizer for _, tokenizer in scan.origins} - {"", info.fingerprint}
    faults += [f"was made by another tokenizer ({fingerprint[:12]})" for fingerprint in sorted(made_by)]
    faults += scan.out_of_vocabulary(info.vocab_size)
    if index_path(path).is_file() and not faults:  # an index that is left is a witness
        try:
            index = read_index(path)
        except UserError:
            return faults  # it is damaged itself, and made again
        if len(index) == len(scan.entries):
            faults += [f"row {row}: differs from its index" for row in (index != scan.index).nonzero()[0].tolist()]
        else:
            faults.append(f"has {len(scan.entries)} rows, its index {len(index)}")
    return faults


def _gaps(sound: dict[str, ShardScan]) -> list[str]:
    """Rows that the numbers in the shards say there were, and that are in none."""
    gaps = []
    for split in SPLITS:
        following = 0
        for name, scan in sound.items():
            if name.startswith(f"{split}/"):
                assert scan.first_row is not None
                if scan.first_row != following:
                    gaps.append(f"{split}: rows {following} to {scan.first_row - 1} are missing before {name}")
                following = scan.first_row + len(scan.entries)
    return gaps


def _adopt(folder: Path, sound: dict[str, ShardScan], info: TokenizerInfo) -> None:
    shapes = set().union(*(scan.shapes for scan in sound.values()))
    sources = {source for scan in sound.values() for source, _ in scan.origins}
    for what, found in (("row lengths or token types", shapes), ("sources", sources)):
        if len(found) != 1:
            raise UserError(f"the shards in {folder} have different {what}: {sorted(found)}; keep one dataset's")
    [(row_len, dtype)], [source] = shapes, sources
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for name, scan in sound.items():
        write_index(folder / name, scan.index)
        splits[name.partition("/")[0]].append(scan.info(name))
    Manifest(row_len, dtype, source, info, splits).save(folder)
