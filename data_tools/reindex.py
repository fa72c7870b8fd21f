"""Repair of a dataset: lost indexes and a lost manifest are rebuilt from the shards, which are not modified."""

from pathlib import Path
from typing import Any

from data_tools.tokenizers import copy_tokenizer, load_tokenizer
from data_tools.verify import manifest_mismatches, scan_all
from fusiontree.data.format import (
    MANIFEST,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    has_index,
    index_path,
    read_index,
)
from fusiontree.data.invariants import SPLITS
from fusiontree.data.shard_scan import ShardScan
from fusiontree.data.writer import write_index
from fusiontree.errors import UserError


def reindex(
    folder: Path, tokenizer: Path | None = None, eos: str | None = None, skip_damaged: bool = False, workers: int = 1
) -> dict[str, Any]:
    """Rebuild the lost indexes of a dataset folder from its shards, and the manifest if it is lost.

    An existing manifest is kept: an index that is missing or differs from it is rebuilt, from a shard with the SHA-256
    in the manifest. A lost manifest is rebuilt from the shards and the tokenizer folder; the list of skipped inputs
    cannot be recovered. Damaged shards are reported and never adopted.

    Args:
        folder: the dataset; the shards are SPLIT/*.tar.
        tokenizer: the tokenizer of the shards, if the manifest is lost; None: DATASET/tokenizer. If that does not
            exist, `tokenizer` is copied there.
        eos: the end-of-document token, see `load_text_tokenizer`.
        skip_damaged: adopt the intact shards even if others are damaged; otherwise nothing is written.
        workers: processes that read shards.

    Returns:
        {shards, rows, tokens, bytes, adopted (true if anything was written), problems}, for the shards with a rebuilt
        index.

    Raises:
        UserError: there are no shards, nothing is lost, or the tokenizer is not that of the shards.
    """
    if (folder / MANIFEST).is_file():
        if tokenizer is not None or eos is not None:
            raise UserError(f"{folder} has a manifest, which names the tokenizer; omit --tokenizer and --eos")
        return _reindex_listed(folder, skip_damaged, workers)
    names = [f"{split}/{path.name}" for split in SPLITS for path in sorted((folder / split).glob("*.tar"))]
    if not names:
        raise UserError(
            f"{folder} contains neither {' nor '.join(f'{split}/*.tar' for split in SPLITS)}; give a dataset folder"
        )
    bundled = folder / "tokenizer"
    if tokenizer is None and not bundled.is_dir():
        raise UserError(f"{folder} contains no tokenizer; pass the tokenizer of the shards as --tokenizer DIR")
    _, info = load_tokenizer(tokenizer or bundled, eos)
    scans = dict(zip(names, scan_all(folder, names, workers), strict=True))
    problems = [f"{name}: {fault}" for name, scan in scans.items() for fault in _faults(folder / name, scan, info)]
    intact = {name: scan for name, scan in scans.items() if not any(line.startswith(f"{name}: ") for line in problems)}
    problems += _gaps(intact)
    adopted = bool(intact) and (skip_damaged or not problems)
    if adopted:
        _adopt(folder, intact, info)
        if not bundled.is_dir() or eos is not None:
            copy_tokenizer(tokenizer or bundled, bundled, eos)
    return _figures(intact, adopted, problems)


def _reindex_listed(folder: Path, skip_damaged: bool, workers: int) -> dict[str, Any]:
    """Rebuild the indexes that are missing or differ from the manifest; see `reindex`."""
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        raise UserError(f"{error}, or remove the manifest and run `fusiontree data reindex` again") from None
    infos = [info for shards in manifest.splits.values() for info in shards if not has_index(folder, info)]
    if not infos:
        raise UserError(
            f"{folder} has its manifest and every index; check it with `fusiontree data verify`, or remove the "
            "manifest to rebuild it"
        )
    present = [info for info in infos if (folder / info.name).is_file()]
    problems = [f"{info.name}: missing" for info in infos if info not in present]
    intact: dict[str, ShardScan] = {}
    for info, scan in zip(present, scan_all(folder, [info.name for info in present], workers), strict=True):
        faults = [*scan.faults, *manifest_mismatches(scan, info, manifest.vocab_size)]
        problems += [f"{info.name}: {fault}" for fault in faults]
        if not faults:
            intact[info.name] = scan
    adopted = bool(intact) and (skip_damaged or not problems)
    if adopted:
        for name, scan in intact.items():
            write_index(folder / name, scan.index)
    return _figures(intact, adopted, problems)


def _figures(intact: dict[str, ShardScan], adopted: bool, problems: list[str]) -> dict[str, Any]:
    return {
        "shards": len(intact),
        "rows": sum(len(scan.entries) for scan in intact.values()),
        "tokens": sum(scan.info(name).tokens for name, scan in intact.items()),
        "bytes": sum(scan.bytes for scan in intact.values()),
        "adopted": adopted,
        "problems": problems,
    }


def _faults(path: Path, scan: ShardScan, info: TokenizerInfo) -> list[str]:
    """Return the reasons against adopting a shard."""
    faults = list(scan.faults)
    fingerprints = {tokenizer for _, tokenizer in scan.origins} - {"", info.fingerprint}
    faults += [f"was built with another tokenizer ({fingerprint[:12]})" for fingerprint in sorted(fingerprints)]
    faults += scan.out_of_vocabulary(info.vocab_size)
    if index_path(path).is_file() and not faults:  # a surviving index vouches for its shard
        try:
            index = read_index(path)
        except UserError:
            return faults  # the index is damaged, and will be rebuilt
        if len(index) == len(scan.entries):
            faults += [f"row {row}: differs from the index" for row in (index != scan.index).nonzero()[0].tolist()]
        else:
            faults.append(f"has {len(scan.entries)} rows, the index {len(index)}")
    return faults


def _gaps(intact: dict[str, ShardScan]) -> list[str]:
    """Return the gaps in the row numbers that the shards record."""
    gaps = []
    for split in SPLITS:
        following = 0
        for name, scan in intact.items():
            if name.startswith(f"{split}/"):
                assert scan.first_row is not None
                if scan.first_row != following:
                    gaps.append(f"{split}: rows {following} to {scan.first_row - 1} are missing before {name}")
                following = scan.first_row + len(scan.entries)
    return gaps


def _adopt(folder: Path, intact: dict[str, ShardScan], info: TokenizerInfo) -> None:
    shapes = set().union(*(scan.shapes for scan in intact.values()))
    sources = {source for scan in intact.values() for source, _ in scan.origins}
    for name, found in (("row lengths or token types", shapes), ("sources", sources)):
        if len(found) != 1:
            raise UserError(
                f"the shards in {folder} have different {name}: {sorted(found)}; keep the shards of one dataset only"
            )
    [(row_len, dtype)], [source] = shapes, sources
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for name, scan in intact.items():
        write_index(folder / name, scan.index)
        splits[name.partition("/")[0]].append(scan.info(name))
    Manifest(row_len, dtype, source, info, splits).save(folder)
