"""Prefill and decoding with the cache return the logits of the full forward pass."""

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.inference.decoder import Decoder
from fusiontree.model import reference
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM
from fusiontree.model.recompute import Recompute


def with_cache(model: HybridLM, ids: torch.Tensor, mask: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Return the logits of `ids`, computed in chunks that end at `cuts`, each of which continues the cache."""
    cache = model.new_cache(ids.shape[0])
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        documents = Documents.from_mask(mask[:, :end]).last(end - start)
        pieces.append(model(ids[:, start:end], documents, cache=cache).logits)
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    padding=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 69), max_size=6),
    kind=st.sampled_from(
        [
            *({}, {"srte": "learned"}, {"window_schedule": "pyramid"}, {"global_heads": 4}),
            *({"layer_kinds": ("attention", "mamba", "hybrid")}, {"layer_global_heads": (2, 0, 0)}),
        ]
    ),
)
@torch.no_grad()
def test_prefill_in_chunks_equals_the_full_forward(seed: int, padding: list[int], cuts: set[int], kind: dict) -> None:
    torch.set_num_threads(1)
    model = build(seed % 7, **kind)
    ids = torch.randint(96, (len(padding), 70), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(70) >= torch.tensor(padding)[:, None]
    full = model(ids, Documents.from_mask(mask)).logits
    torch.testing.assert_close(with_cache(model, ids, mask, sorted(cuts)), full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_far_past_the_window_equals_the_full_forward() -> None:
    model = build()
    ids = torch.randint(96, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    stepped = with_cache(model, ids, mask, list(range(1, 70)))
    torch.testing.assert_close(stepped, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_without_documents_new_tokens_continue_their_row() -> None:
    model = build()
    ids = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    pieces = [model(ids[:, start : start + 10], cache=cache).logits for start in range(0, 50, 10)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_left_padding_changes_no_real_logit_and_padded_rows_are_finite() -> None:
    model = build()
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.tensor([0, 25, 40])[:, None]
    logits = model(ids, Documents.from_mask(mask.int())).logits
    alone = model(ids[1:2, 25:]).logits
    torch.testing.assert_close(logits[1, 25:], alone[0], rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "starts", [(0, 25, 40), (0, 30, 40), (40,)]
)  # shorter and longer than the prompt; only padding
def test_a_row_of_only_padding_decodes_to_finite_logits_and_affects_no_other(starts: tuple[int, ...]) -> None:
    model = build()
    ids = torch.randint(96, (len(starts), 43), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.tensor(starts)[:, None]
    decoder = Decoder(model, len(starts), room=43)
    steps = [decoder.prefill(ids[:, :40], mask), *(decoder.step(ids[:, t]) for t in range(40, 43))]
    for row, start in enumerate(starts):
        logits = torch.stack([step[row] for step in steps])
        assert logits.isfinite().all()
        if start < 40:
            alone = model(ids[row : row + 1, start:]).logits[0, -4:]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_selected_rows_continue_unchanged() -> None:
    model = build()
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3)
    model(ids[:, :30], cache=cache)
    order = torch.tensor([2, 0, 0, 1])
    cache.select(order)
    continued = model(ids[order, 30:], cache=cache).logits
    torch.testing.assert_close(continued, model(ids).logits[order, 30:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("global_heads", [0, 2])
def test_the_cache_grows_with_the_global_heads_only(global_heads: int) -> None:
    model = build(global_heads=global_heads)

    def elements(tokens: int) -> int:
        cache = model.new_cache(1)
        model(torch.zeros(1, tokens, dtype=torch.int64), cache=cache)
        return sum(t.numel() for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t))

    growth = elements(200) - elements(100)
    assert growth == 100 * 3 * 2 * (global_heads // 2) * 8  # tokens, layers, keys and values, heads, head size


def test_a_pruned_branch_has_no_cache() -> None:
    layers = build(layer_kinds=("mamba", "attention", "hybrid")).new_cache(2).layers
    assert [layer.state.numel() > 0 for layer in layers] == [True, False, True]
    assert [layer.conv_tail.numel() > 0 for layer in layers] == [True, False, True]
    assert [layer.ring_k.numel() > 0 for layer in layers] == [False, True, True]
    assert [layer.global_k.shape[2] for layer in layers] == [0, 1, 1]


def test_no_gradient_passes_through_the_cache_and_it_keeps_no_graph_alive() -> None:
    model = build()
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    for piece in (ids[:, :30], ids[:, 30:39], ids[:, 39:]):
        model(piece, cache=cache)
    tensors = [value for layer in cache.layers for value in vars(layer).values()]
    assert not any(value.requires_grad for value in tensors)


def test_recomputation_does_not_change_results_with_a_cache() -> None:
    model = build()
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (Recompute(), Recompute(every=1), Recompute(branches=("mamba", "attention"))):
        model.recompute = recompute
        output = model(ids, cache=model.new_cache(2)).logits.square().sum()
        gradients.append(torch.autograd.grad(output, list(model.blocks[0].parameters())))
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others, strict=True))


def test_a_convolution_with_one_tap_decodes() -> None:
    model = build(conv_kernel=1)
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.tensor([0, 9])[:, None]
    stepped = with_cache(model, ids, mask, [20, *range(21, 40)])
    torch.testing.assert_close(stepped, model(ids, Documents.from_mask(mask)).logits, rtol=1e-4, atol=1e-5)


def test_attention_to_a_long_cache_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 8, generator=draw) for length, heads in ((30, 4), (70, 2), (70, 2)))
    sizes: list[int] = []
    inner = reference._sdpa

    def counted(queries: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(queries.shape[2])
        return inner(queries, *rest)

    monkeypatch.setattr(reference, "_sdpa", counted)
    for window in (None, 20):
        untiled = reference.attention_continued(q, k, v, window)
        with monkeypatch.context() as small:
            small.setattr(reference, "_TILE", 2 * 70 * 8)
            torch.testing.assert_close(reference.attention_continued(q, k, v, window), untiled)
    assert sizes == 2 * [30, 8, 8, 8, 6]


def test_a_decoder_grows_beyond_its_initial_capacity() -> None:
    model = build()
    ids = torch.randint(96, (1, 300), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, 1, room=10)
    steps = [decoder.prefill(ids[:, :150])] + [decoder.step(ids[:, t]) for t in range(150, 300)]
    assert decoder.cache.capacity >= 300
    torch.testing.assert_close(torch.stack(steps, 1), model(ids).logits[:, 149:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"srte": "learned"}, {"window_schedule": "pyramid", "conv_kernel": 1}])
@pytest.mark.parametrize("padded", [False, True])  # whether the longest row is padded
@pytest.mark.parametrize("lengths", [[1, 70], [30, 3, 65, 3], [40, 40, 39], [4]])
def test_prompts_of_very_different_lengths_are_prefilled_without_their_padding(
    lengths: list[int], padded: bool, kind: dict
) -> None:
    model, end = build(**kind), 5 * padded + max(lengths)
    ids = torch.randint(96, (len(lengths), end + 30), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(end) >= end - torch.tensor(lengths)[:, None]
    decoder, seen = Decoder(model, len(lengths), room=end + 30), []
    handle = model.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].numel()))
    steps = [decoder.prefill(ids[:, :end], 2 * mask)]  # any nonzero integer is true
    handle.remove()
    assert sum(seen) <= max(2 * sum(lengths), 135)
    steps += [decoder.step(ids[:, t]) for t in range(end, end + 30)]
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model(ids[row : row + 1, end - length :]).logits[0, length - 1 :]
        torch.testing.assert_close(torch.stack([step[row] for step in steps]), alone, rtol=1e-4, atol=1e-5)
