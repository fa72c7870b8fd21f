"""Preview of a run's data: token counts by source and stage, and the rows of one step (to explain a loss spike)."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from fusiontree.data.order import Place
from fusiontree.data.packing import CELL, Span
from fusiontree.data.stream import TrainStream

MANY_EPOCHS = 4  # up to this number repeated tokens are worth nearly as much as new ones (arXiv 2305.16264)


def preview_run(stream: TrainStream, steps: int) -> dict[str, Any]:
    """Count the tokens of a run of `steps` steps: in total, by source and by stage, all including padding.

    Returns:
        steps, tokens, batch_tokens, padding (share of all tokens), sources (by name: tokens_per_epoch, tokens, share,
        epochs, padding, used_up_at_step or None), stages_from_step (by first step: steps, seq_len, rows_per_step,
        tokens, padding, sources: tokens and epochs by name) and warnings, one line each.
    """
    recipe, sources = stream.recipe, stream.sources
    total = steps * recipe.batch_tokens
    cuts = sorted({step for step, _ in (*recipe.lengths, *recipe.weights) if step < steps})
    tokens_by_source = _tokens_by_source(stream, total)
    epoch_tokens = [dataset.num_rows * sources.row_len for dataset in sources.datasets]
    padding = [1 - int(d.valid_tokens.sum()) / epoch for d, epoch in zip(sources.datasets, epoch_tokens, strict=True)]
    by_source: dict[str, dict[str, Any]] = {
        label: {
            "tokens_per_epoch": epoch,
            "tokens": tokens,
            "share": tokens / total,
            "epochs": tokens / epoch,
            "padding": pad,
            "used_up_at_step": _used_up_at(stream, i, steps),
        }
        for i, (label, epoch, tokens, pad) in enumerate(
            zip(sources.labels, epoch_tokens, tokens_by_source, padding, strict=True)
        )
    }
    return {
        "steps": steps,
        "tokens": total,
        "batch_tokens": recipe.batch_tokens,
        "padding": sum(tokens * pad for tokens, pad in zip(tokens_by_source, padding, strict=True)) / total,
        "sources": by_source,
        "stages_from_step": {
            str(first): _stage_figures(stream, first, end, epoch_tokens, padding)
            for first, end in zip(cuts, [*cuts[1:], steps], strict=True)
        },
        "warnings": [*_too_many_epochs(by_source), *_rows_shorter_than_a_cell(stream, steps)],
    }


def _too_many_epochs(by_source: dict[str, dict[str, Any]]) -> Iterator[str]:
    for label, figures in by_source.items():
        if figures["epochs"] > MANY_EPOCHS:
            yield (
                f"{label} is read {figures['epochs']:.1f} times: after {MANY_EPOCHS} epochs repeated tokens are worth "
                "less and less; lower its weight or max_epochs, or add data"
            )


def _rows_shorter_than_a_cell(stream: TrainStream, steps: int) -> Iterator[str]:
    cell = min(CELL, stream.sources.row_len)
    short = sorted({length for first, length in stream.recipe.lengths if first < steps and length < cell})
    if short:
        yield (
            f"rows of {' and '.join(map(str, short))} tokens are shorter than the cells of {cell} tokens used for "
            f"packing, which cuts documents that would fit; use rows of {cell} tokens or more, or rebuild with a "
            "smaller --row-len"
        )


def _stage_figures(
    stream: TrainStream, first: int, end: int, epoch_tokens: list[int], padding: list[float]
) -> dict[str, Any]:
    batch_tokens = stream.recipe.batch_tokens
    total = (end - first) * batch_tokens
    before = _tokens_by_source(stream, first * batch_tokens)
    after = _tokens_by_source(stream, end * batch_tokens)
    tokens_by_source = [b - a for a, b in zip(before, after, strict=True)]
    seq_len = stream.order.stage(first * batch_tokens).seq_len
    return {
        "steps": end - first,
        "seq_len": seq_len,
        "rows_per_step": batch_tokens // seq_len,
        "tokens": total,
        "padding": sum(tokens * pad for tokens, pad in zip(tokens_by_source, padding, strict=True)) / total,
        "sources": {
            label: {"tokens": tokens, "epochs": tokens / epoch}
            for label, tokens, epoch in zip(stream.sources.labels, tokens_by_source, epoch_tokens, strict=True)
        },
    }


def _tokens_by_source(stream: TrainStream, tokens: int) -> list[int]:
    """Return how many of the first `tokens` tokens come from each source; a partly used packed row counts in part."""
    rows, rest = divmod(tokens, stream.sources.row_len)
    by_source = [count * stream.sources.row_len for count in stream.order.mixture.counts(rows)]
    if rest:
        by_source[stream.order.mixture.locate(rows)[0]] += rest
    return by_source


def _used_up_at(stream: TrainStream, source: int, steps: int) -> int | None:
    """Return the step that uses the last row of a source, or None if none of the first `steps` does."""
    mixture = stream.order.mixture
    limit = mixture.sources[source].limit
    ends = [phase.first for phase in mixture.phases if limit is not None and phase.rows_before[source] >= limit]
    step = (ends[0] * stream.sources.row_len - 1) // stream.recipe.batch_tokens if ends else None
    return step if step is not None and step < steps else None


def documents_at(stream: TrainStream, steps: int) -> dict[str, Any]:
    """Return the rows and documents of the stream's rank in the step after `steps` more steps.

    Returns:
        rank, world_size, seq_len and rows, in order: batch (index in the rank's gradient accumulation), source, epoch,
        shard, row (within the shard), first_token (within the stored row) and documents: id, start (within the
        training row), length, offset (tokens of the document before), continues (whether it continues after this row).

    Raises:
        RunError: a shard cannot be read.
    """
    seq_len, places = _places(stream, stream.rows_consumed_after(steps))
    rows = [
        {"batch": number, **_row(stream, place, seq_len), "documents": _documents(stream, place, seq_len)}
        for number, place in places
    ]
    return {"rank": stream.rank, "world_size": stream.world_size, "seq_len": seq_len, "rows": rows}


def rows_at(stream: TrainStream, rows_consumed: int) -> list[dict[str, Any]]:
    """Return the rows of the rank's step after `rows_consumed`, as `documents_at` does; this reads no shard."""
    seq_len, places = _places(stream, rows_consumed)
    return [_row(stream, place, seq_len) for _, place in places]


def _places(stream: TrainStream, rows_consumed: int) -> tuple[int, list[tuple[int, Place]]]:
    """Return the step's row length in tokens, and (batch index, place) of each of the rank's rows."""
    seq_len = stream.order.stage(rows_consumed * stream.recipe.seq_len).seq_len
    batches = enumerate(stream.places(rows_consumed))
    return seq_len, [(number, place) for number, places in batches for place in places]


def _row(stream: TrainStream, place: Place, seq_len: int) -> dict[str, Any]:
    shard, row = stream.sources.datasets[place.source].place(place.row)
    return {
        "source": stream.sources.labels[place.source],
        "epoch": place.epoch,
        "shard": shard.where,
        "row": row,
        "first_token": place.part * seq_len,
    }


def _documents(stream: TrainStream, place: Place, seq_len: int) -> list[dict[str, Any]]:
    first = place.part * seq_len
    spans = stream.sources.datasets[place.source].spans(place.row)
    clipped = [_clip(span, first, first + seq_len) for span in spans]
    return [asdict(span) for span in clipped if span.length > 0]


def _clip(span: Span, first: int, end: int) -> Span:
    """Clip a document's span to tokens `first` to `end` of its row; without overlap its length is not positive."""
    start, stop = max(span.start, first), min(span.start + span.length, end)
    offset, continues = span.offset + start - span.start, span.continues or span.start + span.length > end
    return replace(span, start=start - first, length=stop - start, offset=offset, continues=continues)
