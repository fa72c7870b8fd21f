"""Sampling: candidate sets are exact, seeds are reproducible, rows are independent."""

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.errors import UserError
from fusiontree.inference.generate import stream_tokens
from fusiontree.inference.sampling import Sampling, candidates, draw


def drawn(logits: torch.Tensor, sampling: Sampling, times: int = 400) -> set[int]:
    """Return the set of tokens drawn in `times` draws."""
    generator = torch.Generator().manual_seed(0)
    return {int(draw(logits, torch.zeros_like(logits, dtype=torch.bool), sampling, generator)) for _ in range(times)}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(0.05, 0.999), tokens=st.integers(1, 40), temperature=st.floats(0.2, 5.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, tokens: int, temperature: float) -> None:
    logits = torch.randn(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * temperature
    probabilities = logits.softmax(0).tolist()
    expected: set[int] = set()
    for token in sorted(range(tokens), key=lambda t: -probabilities[t]):
        if sum(probabilities[t] for t in expected) >= p:
            break
        expected.add(token)
    kept, order = candidates(logits, Sampling(top_p=p))
    assert set(order[kept > 0].tolist()) == expected


def test_top_p_is_exact_in_a_large_vocabulary_and_where_p_is_met_exactly() -> None:
    for seed in range(4):
        logits = torch.randn(50_432, generator=torch.Generator().manual_seed(seed))
        kept, _ = candidates(logits, Sampling(top_p=0.9999))
        probabilities = logits.double().softmax(0).sort(descending=True).values
        assert int((kept > 0).sum()) == int((probabilities.cumsum(0) < 0.9999).sum()) + 1
    kept, _ = candidates(torch.zeros(4), Sampling(top_p=0.5))
    assert kept.tolist() == [0.25, 0.25, 0, 0]


def test_top_k_min_p_and_temperature_select_their_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()
    assert drawn(logits, Sampling()) == {0, 1, 2, 3, 4}
    assert drawn(logits, Sampling(top_k=2)) == {0, 1}
    assert drawn(logits, Sampling(min_p=0.15)) == {0, 1, 2}
    assert drawn(logits, Sampling(temperature=0)) == {0}
    for temperature in (1e-4, 1e-38, 5e-324):  # the last two underflow in fp32
        assert drawn(logits, Sampling(temperature=temperature)) == {0}


def test_repetition_penalty_divides_positive_scores_and_multiplies_negative_ones() -> None:
    logits, seen = torch.tensor([2.0, 1.5, -1.0]), torch.tensor([True, False, True])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert draw(logits, seen, greedy, torch.Generator()) == 1
    assert draw(torch.tensor([-1.0, -1.5]), torch.tensor([True, False]), greedy, torch.Generator()) == 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_p=0.9, repetition_penalty=1.3, seed=3)])
def test_a_row_does_not_depend_on_its_batch(sampling: Sampling) -> None:
    model = build()
    prompts = [[5, 6, 7], list(range(40)), [9]]
    together = list(stream_tokens(model, prompts, 12, sampling, stop=None))
    for row, prompt in enumerate(prompts):
        alone = [token for (token,) in stream_tokens(model, [prompt], 12, sampling, stop=None)]
        assert alone == [tokens[row] for tokens in together]


@pytest.mark.parametrize("kind", [{"tie_embeddings": False}, {"tie_embeddings": False, "srte": "learned"}])
def test_greedy_tokens_match_complete_forwards(kind: dict) -> None:
    model = build(**kind)
    prompts = [[5, 6, 7], list(range(40)), [9]]
    rows = list(zip(*stream_tokens(model, prompts, 30, Sampling(temperature=0), stop=None), strict=True))
    for prompt, row in zip(prompts, rows, strict=True):
        with torch.no_grad():  # one pass, because a later token changes no earlier logit
            before_each = model(torch.tensor([[*prompt, *row[:-1]]])).logits[0, len(prompt) - 1 :]
        for logits, token in zip(before_each, row, strict=True):
            assert logits.max() - logits[token] < 1e-4  # the likeliest, up to rounding


def test_a_stopped_row_yields_stop_until_all_rows_stop() -> None:
    model = build()
    prompts = [[5, 6, 7], list(range(40)), [9]]
    free = list(stream_tokens(model, prompts, 12, Sampling(temperature=0), stop=None))
    stop = free[3][0]
    rows = list(zip(*stream_tokens(model, prompts, 12, Sampling(temperature=0), stop=stop), strict=True))
    assert rows[0].index(stop) == [tokens[0] for tokens in free].index(stop)
    assert set(rows[0][rows[0].index(stop) :]) == {stop}


def test_text_depends_on_the_seed_alone() -> None:
    model = build()
    texts = [list(stream_tokens(model, [[1, 2]], 20, Sampling(seed=seed), None)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("values", "words"),
    [({"temperature": -1}, "--temperature is -1"), ({"top_p": 0}, "--top-p is 0"), ({"top_k": -2}, "--top-k is -2"),
     ({"min_p": 2}, "--min-p is 2"), ({"repetition_penalty": 0}, "--repetition-penalty is 0")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**values)
