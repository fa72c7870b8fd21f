"""The dataset builder: text to packed shards. Equal inputs give equal bytes for any worker count and interruptions."""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.assembly import DIGESTS, SOURCE, STATE, Assembly, Position, State, load_state, state_mismatch
from data_tools.inputs import TextFile, find_files
from data_tools.options import BuildOptions, InputOptions
from data_tools.readers import TOO_LONG, TOO_SHORT, Record, read_records, require_readers
from data_tools.tokenizers import copy_tokenizer
from data_tools.workers import Workers, start_workers
from fusiontree import __version__
from fusiontree.console import console, progress_bar
from fusiontree.data.format import MANIFEST, Manifest, TokenizerInfo, token_dtype
from fusiontree.data.invariants import SPLITS
from fusiontree.data.packing import PACKER_VERSION
from fusiontree.data.tokenizer import require_golden
from fusiontree.errors import RunError, UserError
from fusiontree.files import parse_json, refuse_existing, resumable_folder, write_atomic

SAVE_SECONDS = 10.0  # minimum time between two saves of the state
SAVE_SHARE = 0.05  # maximum fraction of the time spent saving
_CHUNK_BYTES, _CHUNK_RECORDS = 1 << 20, 2048  # limits of a worker's unit of work
_JOB = "job.json"
_STATE_FILES = (STATE, DIGESTS, _JOB)


def build_shards(
    inputs: Sequence[Path | str], tokenizer: Path, output: Path, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Build a dataset folder from text.

    An interrupted or killed build resumes when it is called again with the same arguments.

    Args:
        inputs: files, folders or glob patterns, see `find_files` and `docs/data.md`.
        tokenizer: a Hugging Face tokenizer folder; its tokenizer.json and configuration are copied to OUTPUT/tokenizer.
        output: the dataset folder; it appears when it is complete.
        options: see `BuildOptions`.

    Returns:
        The figures: output, documents, tokens (without padding), rows, padding (fraction of all tokens), cut_documents
        (longer than a row), duplicates, too_short and too_long (documents outside the length limits), bytes of the
        shards, encoder, omitted (tokens that the tokenizer's post-processor would add), seconds and tokens_per_s of
        this call, continued (true if it resumed a build), skipped inputs.

    Raises:
        UserError: an argument or an input is wrong.
        RunError: a worker died, or an input changed during the build.
    """
    started = time.perf_counter()
    options = options or BuildOptions()
    refuse_existing(output, options.overwrite, marker=MANIFEST)
    files, skipped = find_files(inputs, options.input)
    require_readers(files)
    with (
        start_workers(tokenizer, options) as workers,
        resumable_folder(output, options.overwrite, MANIFEST, _STATE_FILES) as folder,
    ):
        info = workers.encoder.info
        if omitted := workers.encoder.omitted:
            console.print(
                f"the tokenizer's post-processor adds {' and '.join(omitted)} to each text; documents do not get "
                f"{'it' if len(omitted) == 1 else 'them'}, nor do prompts in generation, evaluation and the export",
                markup=False,
            )
        state = _resume_or_restart(folder, _job(files, info, options), tokenizer, options.overwrite)
        held_out_files = None if options.holdout_from == "spread" else _last_files(files, options.holdout)
        assembly = Assembly(folder, info, options, held_out_files, state)
        if not assembly.resumed:
            assembly.report.add_inputs(skipped)
        tokens_before = assembly.tokens
        try:
            _assemble(assembly, files, options.input, workers)
        except KeyboardInterrupt:
            if (folder / STATE).exists():
                console.print("run the same command again to resume this build")
            raise
        if not assembly.report.documents:
            raise UserError(f"no documents in {', '.join(map(str, inputs))} ({assembly.report.why_empty()})")
        dtype = token_dtype(info.vocab_size).name
        manifest = Manifest(options.row_len, dtype, SOURCE, info, assembly.finish(), assembly.report.to_json())
        copy_tokenizer(tokenizer, folder / "tokenizer", options.eos)
        manifest.save(folder)
    seconds = time.perf_counter() - started
    encoder = workers.encoder.name + (f" ({workers.encoder.note})" if workers.encoder.note else "")
    speed = {
        "encoder": encoder,
        "omitted": workers.encoder.omitted,
        "seconds": seconds,
        "tokens_per_s": (assembly.tokens - tokens_before) / seconds,
    }
    outcome = {"continued": assembly.resumed, "skipped": manifest.skipped}
    return {"output": str(output)} | _figures(manifest, assembly) | speed | outcome


def _figures(manifest: Manifest, assembly: Assembly) -> dict[str, Any]:
    totals = [manifest.totals(split) for split in SPLITS]
    tokens, rows = (sum(total[name] for total in totals) for name in ("tokens", "rows"))
    return {
        "documents": assembly.report.documents,
        "tokens": tokens,
        "rows": rows,
        "padding": 1 - tokens / (rows * manifest.row_len),
        "cut_documents": assembly.state.cut,
        "duplicates": assembly.state.duplicates,
        "too_short": assembly.report.filtered[TOO_SHORT],
        "too_long": assembly.report.filtered[TOO_LONG],
        "bytes": sum(total["bytes"] for total in totals),
    }


def _last_files(files: Sequence[TextFile], share: float) -> frozenset[str]:
    """Return the names of the last `share` of the files: at least one, never all.

    Raises:
        UserError: the only file would be held out.
    """
    if len(files) < 2 and share:
        raise UserError("--holdout-from end holds out complete files, and there is only one; use --holdout-from spread")
    return frozenset(file.name for file in files[len(files) - math.ceil(share * len(files)) :]) - {files[0].name}


def _job(files: Sequence[TextFile], info: TokenizerInfo, options: BuildOptions) -> dict[str, Any]:
    """Return everything that the bytes of a dataset depend on, as JSON."""
    names = json.dumps([(file.name, file.size, file.mtime_ns) for file in files])
    return {
        "row_len": options.row_len,
        "holdout": options.holdout,
        "holdout_from": options.holdout_from,
        "dedup": options.dedup,
        "encoder": options.encoder,
        "text_key": options.input.text_key,
        "separator": options.input.separator,
        "min_chars": options.input.min_chars,
        "max_chars": options.input.char_limit,
        "input_files": hashlib.sha256(names.encode()).hexdigest(),
        "tokenizer": info.fingerprint,
        "end-of-document_token": info.eos_id,
        "golden_samples": info.golden,
        "versions": [__version__, PACKER_VERSION],
    }


def _resume_or_restart(folder: Path, job: dict[str, Any], tokenizer: Path, overwrite: bool) -> State | None:
    """Return the state to resume from and remove stray files; without a usable state, leave only the job file.

    Raises:
        UserError: the state belongs to a build with other arguments, or the tokenizer now gives other token ids; not
            raised with `overwrite`.
        RunError: the state or its files are damaged; not raised with `overwrite`.
    """
    state = None
    if (folder / STATE).exists():
        try:
            _require_same_job(folder / _JOB, job, tokenizer)
            state = load_state(folder)
        except (UserError, RunError):
            if not overwrite:
                raise
    kept = {*_STATE_FILES, *SPLITS} if state else set()
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomic(folder / _JOB, json.dumps(job))
    return state


def _require_same_job(path: Path, job: dict[str, Any], tokenizer: Path) -> None:
    """Raise an error, as `_resume_or_restart` does, unless the job file of the interrupted build equals `job`."""
    try:
        interrupted = parse_json(path.read_text(encoding="utf-8"))
        golden = interrupted.get("golden_samples", {})
        "".join(golden.keys()).encode()  # damage can leave half of an escaped character
    except (AttributeError, OSError, ValueError):
        raise state_mismatch(path) from None
    if differing := [name.replace("_", " ") for name in job if interrupted.get(name) != job[name]]:
        require_golden(golden, tokenizer)
        raise UserError(
            f"{path.parent} contains an interrupted build with different {', '.join(differing)}; "
            "pass the same arguments to resume it, or --overwrite to restart"
        )


@dataclass(frozen=True)
class _Chunk:
    """Consecutive records, enough of them to outweigh the cost of a message to a worker."""

    records: list[Record]
    position: Position  # of the record after them
    bytes_read: int  # of all files, up to `position`


def _assemble(assembly: Assembly, files: Sequence[TextFile], options: InputOptions, workers: Workers) -> None:
    """Read, encode and add the records from `assembly.position` on, in order."""
    start = assembly.position
    checked = workers.map_ordered(workers.find_fault, files[start.file :])
    chunks = _chunks(checked, options, start, sum(file.size for file in files[: start.file]))
    started, tokens_before = time.monotonic(), assembly.tokens
    next_save = started + SAVE_SECONDS
    with progress_bar(in_bytes=True) as bar:
        task = bar.add_task("build", total=sum(file.size for file in files), note="")
        for chunk, encoded in workers.map_ordered(lambda chunk: workers.encode(chunk.records), chunks):
            assembly.add(chunk.records, encoded, chunk.position)
            now = time.monotonic()
            if now >= next_save:
                assembly.save()
                saved = time.monotonic()
                next_save = saved + max(SAVE_SECONDS, (saved - now) / SAVE_SHARE)
            speed = (assembly.tokens - tokens_before) / max(now - started, 1e-9)
            bar.update(task, completed=chunk.bytes_read, note=f"{speed / 1e6:.2f} Mtok/s")


def _chunks(
    checked: Iterable[tuple[TextFile, str]], options: InputOptions, start: Position, bytes_before: int
) -> Iterator[_Chunk]:
    """Yield the records from `start` on in chunks.

    Args:
        checked: the files from `start.file` on, with their faults.
        options: of the inputs.
        start: the first record.
        bytes_before: total size of the files before `start.file`.
    """
    batch: list[Record] = []
    size = 0
    position, bytes_read = start, bytes_before
    for number, (file, fault) in enumerate(checked, start.file):
        first = start.record if number == start.file else 0
        remaining = itertools.islice(read_records(file, options, fault), first, None)
        for following, record in enumerate(remaining, first + 1):
            batch.append(record)
            size += len(record.content)
            position, bytes_read = Position(number, following), bytes_before + record.bytes_read
            if size >= _CHUNK_BYTES or len(batch) == _CHUNK_RECORDS:
                yield _Chunk(batch, position, bytes_read)
                batch, size = [], 0
        bytes_before += file.size
    if batch:
        yield _Chunk(batch, position, bytes_read)
