"""The stream's only state is one integer: ranks, workers, stops and resumes never change the sequence of rows."""

import threading
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import counting_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.sources import Sources
from fusiontree.data.stream import Recipe, TrainStream, single_source_recipe
from fusiontree.errors import UserError

ROW = 32  # tokens of a packed row


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    sizes = {"web": 50, "code": 23, "books": 9}
    firsts = {"web": 2, "code": 10_002, "books": 20_002}
    return Sources({name: counting_dataset(root / name, size, firsts[name]) for name, size in sizes.items()})


# 16 rows of 32 tokens per step; lengths 8, 16 and 32; changing weights; a source that is used up
RECIPE = Recipe(
    seed=5,
    batch_tokens=16 * ROW,
    lengths=((0, 8), (5, 16), (11, 32)),
    weights=((0, (Fraction(3), Fraction(2), Fraction(1))), (8, (Fraction(1), Fraction(2), Fraction(1)))),
    max_epochs=(None, Fraction(4), Fraction(2)),
)
STEPS = 20


def rows_of(ranks: list[list]) -> list[tuple[int, ...]]:
    """Return the rows of one step in global order, from each rank's batches."""
    return [tuple(row) for batches in zip(*ranks, strict=True) for batch in batches for row in batch.input_ids.tolist()]


def run(sources: Sources, recipe: Recipe, start: int, steps: int, world: int, micro_rows: int, workers: int) -> list:
    """Run `steps` steps after `start` rows; return the global rows of each, and the final state."""
    streams = [TrainStream(sources, recipe, micro_rows, rank, world, workers) for rank in range(world)]
    for stream in streams:
        stream.seek(start)
    found = [rows_of([next(stream) for stream in streams]) for _ in range(steps)]
    (state,) = {stream.rows_consumed for stream in streams}
    for stream in streams:
        stream.close()
    return [found, state]


@pytest.fixture(scope="module")
def undisturbed(sources: Sources) -> list:
    return run(sources, RECIPE, 0, STEPS, 1, 16, 0)[0]


def test_sequence_follows_the_recipe(undisturbed: list) -> None:
    assert [{len(row) for row in step} for step in undisturbed] == [{8}] * 5 + [{16}] * 6 + [{32}] * 9
    assert all(len(step) * len(step[0]) == RECIPE.batch_tokens for step in undisturbed)
    packed = [(token - 2) // 10_000 for step in undisturbed for row in step for token in row[::ROW]]
    assert set(packed) == {0, 1, 2}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.integers(1, 6), min_size=5, max_size=5),
)
def test_sequence_does_not_depend_on_ranks_workers_stops_and_resumes(
    sources: Sources, undisturbed: list, legs: list, lengths: list[int]
) -> None:
    found, state = [], 0
    for (world, micro_rows, workers), steps in zip(legs, lengths, strict=False):
        rows, state = run(sources, RECIPE, state, steps, world, min(micro_rows, 16 // world), workers)
        found += rows
    expected = undisturbed if len(found) <= STEPS else run(sources, RECIPE, 0, len(found), 1, 16, 0)[0]
    assert found == expected[: len(found)]
    assert state == len(found) * 16


@pytest.mark.slow
def test_sequence_is_the_same_from_8_to_16_to_1_ranks(sources: Sources, undisturbed: list) -> None:
    found, state = [], 0
    for world, steps in ((8, 6), (16, 7), (1, 7)):
        rows, state = run(sources, RECIPE, state, steps, world, 1, 1)
        found += rows
    assert found == undisturbed


def test_prefetched_batches_are_not_part_of_the_state(sources: Sources) -> None:
    stream = TrainStream(sources, RECIPE, 4, workers=3)
    next(stream)
    assert stream.rows_consumed == 16
    stream.close()
    again = TrainStream(sources, RECIPE, 4)
    again.seek(16)
    assert rows_of([next(stream)]) == rows_of([next(again)])
    stream.close()


def test_resume_needs_no_replay(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 10^9 needs as few permuted rows as step 100 (counted, not timed)."""
    from fusiontree.data import order

    recipe = Recipe(5, RECIPE.batch_tokens, RECIPE.lengths, RECIPE.weights, (None, None, None))
    calls = []
    permute = order.permute
    monkeypatch.setattr(order, "permute", lambda *words: calls.append(words) or permute(*words))
    counts = {}
    for step in (100, 10**9):
        calls.clear()
        stream = TrainStream(sources, recipe, 16)
        stream.seek(step * 16)
        assert len(rows_of([next(stream)])) == 16
        counts[step] = sum(len(index) for index, *_ in calls)
    assert counts[10**9] <= 1.2 * counts[100]


def test_epoch_under_a_curriculum_contains_each_token_once(tmp_path: Path) -> None:
    lone = Sources({"": counting_dataset(tmp_path / "lone", 64, 2)})
    recipe = Recipe(0, 16 * ROW, ((0, 8), (1, 16), (3, 32)), ((0, (Fraction(1),)),), (None,))
    found, _ = run(lone, recipe, 0, 8, 2, 4, 2)
    tokens = [token for step in found for row in step for token in row]
    assert sorted(tokens[: 64 * ROW]) == sorted(tokens[64 * ROW :]) == [*range(2, 64 * ROW + 2)]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_exception_of_a_worker_keeps_its_traceback(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = sources.datasets[0].row, []

    def bug(number: int) -> tuple[np.ndarray, np.ndarray]:
        reads.append(number)
        if len(reads) == 30:
            raise ZeroDivisionError("ours")
        return read(number)

    monkeypatch.setattr(sources.datasets[0], "row", bug)
    stream = TrainStream(sources, RECIPE, 1, workers=2)
    with pytest.raises(ZeroDivisionError) as caught:
        [next(stream) for _ in range(STEPS)]
    with pytest.raises(ZeroDivisionError):  # not the batch after the missing one
        next(stream)
    assert "bug" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    stream.close()


def test_close_stops_the_workers(sources: Sources) -> None:
    before = threading.active_count()
    stream = TrainStream(sources, RECIPE, 1, workers=3)
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    assert threading.active_count() == before


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row_len", "tokenizer", "words"),
    [(64, "f", r"different row lengths \(32, 64\)"), (ROW, "g", r"different tokenizers \(f, g\)")],
)
def test_incompatible_sources_are_refused_by_name(
    sources: Sources, tmp_path: Path, row_len: int, tokenizer: str, words: str
) -> None:
    other = counting_dataset(tmp_path / "other", 3, 2, row_len, tokenizer)
    with pytest.raises(UserError, match=words) as caught:
        Sources({"web": sources.datasets[0], "other": other})
    assert all(str(folder) in str(caught.value) for folder in (other.folder, sources.datasets[0].folder))


def test_change_inside_a_packed_row_is_refused_with_the_nearest_valid_steps(sources: Sources) -> None:
    recipe = Recipe(0, 8, ((0, 8),), ((0, (Fraction(1),) * 3), (6, (Fraction(1),) * 3)), (None,) * 3)
    with pytest.raises(UserError, match=r"step 6 .* 32 tokens; .* 8 tokens per step: 4 or 8"):
        TrainStream(sources, recipe, 1)


def test_stream_ends_with_its_sources(sources: Sources) -> None:
    lone = Sources({"": sources.datasets[1]})
    recipe = Recipe(0, 4 * ROW, ((0, ROW),), ((0, (Fraction(1),)),), (Fraction(2),))
    stream = TrainStream(lone, recipe, 4, workers=2)
    assert stream.last_step == 11  # 46 rows
    assert len([*stream]) == 11
    assert next(stream, None) is None
    stream.close()


def test_single_source_needs_no_name(sources: Sources) -> None:
    lone, named = (Sources({name: sources.datasets[0]}) for name in ("", "web"))
    assert lone.labels == ("s",)
    assert named.labels == ("web",)
    assert lone.fingerprint == sources.datasets[0].fingerprint != named.fingerprint
    assert TrainStream(lone, single_source_recipe(0, 4 * ROW, ROW), 4).last_step is None
