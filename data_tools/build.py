"""Text to packed shards: the same documents give the same bytes, whatever the number of workers and interruptions."""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.assembly import DIGESTS, SOURCE, STATE, Assembly, State, load_state, not_as_left
from data_tools.inputs import TextFile, find_files
from data_tools.readers import TOO_LONG, TOO_SHORT, Reading, Record, records, require_readers
from data_tools.tokenizers import copy_tokenizer
from data_tools.workers import Work, Workers, start_workers
from fusiontree import __version__
from fusiontree.console import console, progress_bar
from fusiontree.data.format import MANIFEST, SPLITS, Manifest, TokenizerInfo, token_dtype
from fusiontree.data.packing import PACKER_VERSION, check_row_len
from fusiontree.data.tokenizer import require_golden
from fusiontree.errors import RunError, UserError
from fusiontree.files import refuse_existing, resumable_folder, write_atomic

SAVE_SECONDS = 10.0  # between two states that an interrupted build can go on from, at least
SAVE_SHARE = 0.05  # of the time that saving them may take
_CHUNK_BYTES, _CHUNK_RECORDS = 1 << 20, 2048  # given to a worker at a time
_JOB = "job.json"
_STATE = (STATE, DIGESTS, _JOB)


def build(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    output: Path,
    holdout: float = 0.02,
    holdout_from: str = "spread",
    workers: int = 1,
    row_len: int = 32768,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    reading: Reading | None = None,
    dedup: bool = False,
    eos: str | None = None,
    encoder: str = "auto",
) -> dict[str, Any]:
    """Build a dataset folder from text.

    A build that was interrupted, even killed, goes on when it is started again with the same arguments.

    Args:
        inputs: files, folders or glob patterns, see `find_files` and `docs/format.md`.
        tokenizer: a Hugging Face tokenizer folder; what users of the shards need of it is copied to OUTPUT/tokenizer.
        output: the dataset folder to make; it appears whole, or not at all.
        holdout: share of the documents that make the validation split.
        holdout_from: "spread": evenly over all documents; "end": those of so great a share of the files, the last ones,
            so that what lies close together is not parted.
        workers: processes that tokenise.
        row_len: tokens per packed row.
        include: glob patterns a file must match.
        exclude: glob patterns it must not match.
        overwrite: replace what `output` holds, and start again instead of refusing what another build left.
        reading: how documents are taken out of files.
        dedup: leave out a document whose text came before, in the order of the inputs.
        eos: the end-of-document token, see `load_tokenizer`.
        encoder: the library that encodes, see `Encoder`.

    Returns the figures: output, documents, tokens (padding not counted), rows, padding (share of all tokens),
    cut_documents (longer than a row), duplicates, too_short and too_long (documents left out by length), bytes of the
    shards, encoder, seconds and tokens_per_s of this run, continued (whether it went on), skipped inputs.

    Raises:
        UserError: a mistake in the arguments or inputs.
        RunError: a worker died, or an input changed meanwhile.
    """
    started = time.perf_counter()
    reading = reading or Reading()
    if not 0 <= holdout < 1:
        raise UserError(f"holdout {holdout} is not a share of the documents; give 0 or more and less than 1")
    if workers < 1:
        raise UserError(f"workers {workers} is too few; give at least 1")
    check_row_len(row_len)
    refuse_existing(output, overwrite, marker=MANIFEST)
    files, skipped = find_files(inputs, include, exclude)
    require_readers(files)
    work = Work(tokenizer, eos, encoder, reading, digests=dedup)
    with start_workers(work, workers) as team, resumable_folder(output, overwrite, MANIFEST, _STATE) as folder:
        info = team.encoder.info
        choices = {"row_len": row_len, "holdout": holdout, "holdout_from": holdout_from, "dedup": dedup}
        job = _job(files, info, **choices, encoder=encoder, **asdict(reading))
        state = _go_on_or_start(folder, job, tokenizer, overwrite)
        held_out = holdout if holdout_from == "spread" else _last(files, holdout)
        made = Assembly(folder, info, row_len, held_out, dedup, state)
        if not made.continued:
            made.report.skip(skipped)
        before = made.tokens
        try:
            _assemble(made, files, reading, team)
        except KeyboardInterrupt:
            if (folder / STATE).exists():
                console.print("the same command goes on from what is saved")
            raise
        if not made.report.documents:
            raise UserError(f"no documents in {', '.join(map(str, inputs))} ({made.report.why_nothing()})")
        dtype = token_dtype(info.vocab_size).name
        manifest = Manifest(row_len, dtype, SOURCE, info, made.finish(), made.report.skipped())
        copy_tokenizer(tokenizer, folder / "tokenizer", eos)
        manifest.save(folder)
    seconds = time.perf_counter() - started
    library = team.encoder.name + (f" ({team.encoder.note})" if team.encoder.note else "")
    speed = {"encoder": library, "seconds": seconds, "tokens_per_s": (made.tokens - before) / seconds}
    ends = {"continued": made.continued, "skipped": manifest.skipped}
    return {"output": str(output)} | _figures(manifest, made) | speed | ends


def _figures(manifest: Manifest, made: Assembly) -> dict[str, Any]:
    totals = [manifest.totals(split) for split in SPLITS]
    tokens, rows = (sum(total[name] for total in totals) for name in ("tokens", "rows"))
    return {
        "documents": made.report.documents,
        "tokens": tokens,
        "rows": rows,
        "padding": 1 - tokens / (rows * manifest.row_len),
        "cut_documents": made.state.cut,
        "duplicates": made.state.duplicates,
        "too_short": made.report.filtered[TOO_SHORT],
        "too_long": made.report.filtered[TOO_LONG],
        "bytes": sum(total["bytes"] for total in totals),
    }


def _last(files: Sequence[TextFile], share: float) -> frozenset[str]:
    """Names of the last `share` of the files: one at least, and never all.

    Raises:
        UserError: there is a single file, whose documents would be all or none.
    """
    if len(files) < 2 and share:
        raise UserError("--holdout-from end holds out whole files, but there is one only; take --holdout-from spread")
    return frozenset(file.name for file in files[len(files) - math.ceil(share * len(files)) :]) - {files[0].name}


def _job(files: Sequence[TextFile], info: TokenizerInfo, **arguments: Any) -> dict[str, Any]:
    """All that the bytes of a dataset depend on, as JSON has it."""
    names = json.dumps([(file.name, file.size, file.mtime_ns) for file in files])
    return arguments | {
        "input_files": hashlib.sha256(names.encode()).hexdigest(),
        "tokenizer": info.fingerprint,
        "end-of-document_token": info.eos_id,
        "golden_samples": info.golden,
        "versions": [__version__, PACKER_VERSION],
    }


def _go_on_or_start(folder: Path, job: dict[str, Any], tokenizer: Path, overwrite: bool) -> State | None:
    """Leave in `folder` what the same build can go on from, and return its state; or leave nothing but the job.

    Raises:
        UserError: another build left it, or the tokenizer encodes otherwise now, and not `overwrite`.
        RunError: it is not as it was left, and not `overwrite`.
    """
    state = None
    if (folder / STATE).exists():
        try:
            _require_same(folder / _JOB, job, tokenizer)
            state = load_state(folder)
        except (UserError, RunError):
            if not overwrite:
                raise
    kept = {*_STATE, *SPLITS} if state else set()
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomic(folder / _JOB, json.dumps(job))
    return state


def _require_same(path: Path, job: dict[str, Any], tokenizer: Path) -> None:
    """Hold the job that a build has left in a file to this one; raises as `_go_on_or_start` does."""
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise not_as_left(path) from None
    if not isinstance(left, dict):
        raise not_as_left(path)
    if differing := [name.replace("_", " ") for name in job if left.get(name) != job[name]]:
        require_golden(left.get("golden_samples", {}), tokenizer)
        raise UserError(
            f"{path.parent} holds an interrupted build with another choice of {', '.join(differing)}; "
            "give the same arguments to go on, or --overwrite to start again"
        )


@dataclass(frozen=True)
class _Chunk:
    """Consecutive records, enough of them to be worth a message to a worker."""

    records: list[Record]
    position: tuple[int, int]  # of what comes after them: file, record
    read: int  # bytes of all files read up to there


def _assemble(made: Assembly, files: Sequence[TextFile], reading: Reading, team: Workers) -> None:
    """Hand all records that are not yet in `made` to it, in order."""
    first, done = made.position
    examined = team.in_order(team.examine, files[first:])
    chunks = _chunks(examined, reading, first, done, sum(file.size for file in files[:first]))
    started, before = time.monotonic(), made.tokens
    due = started + SAVE_SECONDS
    with progress_bar(of_bytes=True) as bar:
        task = bar.add_task("build", total=sum(file.size for file in files), note="")
        for chunk, encoded in team.in_order(lambda chunk: team.encode(chunk.records), chunks):
            made.take(chunk.records, encoded, chunk.position)
            now = time.monotonic()
            if now >= due:
                made.save()
                saved = time.monotonic()
                due = saved + max(SAVE_SECONDS, (saved - now) / SAVE_SHARE)
            speed = (made.tokens - before) / max(now - started, 1e-9)
            bar.update(task, completed=chunk.read, note=f"{speed / 1e6:.2f} Mtok/s")


def _chunks(
    examined: Iterable[tuple[TextFile, str]], reading: Reading, first: int, done: int, read: int
) -> Iterator[_Chunk]:
    """The records of the examined files, which begin with file `first`, of which `done` records are left out."""
    held: list[Record] = []
    size = 0
    position, end = (first, done), read
    for number, (file, fault) in enumerate(examined, first):
        start = done if number == first else 0
        for count, record in enumerate(itertools.islice(records(file, reading, fault), start, None), start + 1):
            held.append(record)
            size += len(record.content)
            position, end = (number, count), read + record.read
            if size >= _CHUNK_BYTES or len(held) == _CHUNK_RECORDS:
                yield _Chunk(held, position, end)
                held, size = [], 0
        read += file.size
    if held:
        yield _Chunk(held, position, end)
