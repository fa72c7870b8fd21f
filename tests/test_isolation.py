"""Documents in a packed row are isolated from each other, and no token sees later tokens."""

import pytest
import torch
from conftest import build, documents_of

from fusiontree.model.lm import HybridLM
from fusiontree.model.reference import convolution

# documents longer and shorter than the chunk (16) and the window (16); boundaries on and off chunk boundaries
ROWS = [[37, 3, 24], [16, 20, 28]]
KINDS = [
    {},
    {"srte": "learned"},
    {"srte": "none", "global_heads": 0},
    {"window_schedule": "pyramid", "fusion": "token"},
    {"layer_kinds": ("attention", "mamba", "hybrid"), "layer_global_heads": (2, 2, 0)},
]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_their_documents_alone(kind: dict) -> None:
    model = build(**kind)
    ids = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(0))
    packed = model(ids, documents_of(ROWS)).logits
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            alone = model(ids[row : row + 1, start : start + length]).logits[0]
            torch.testing.assert_close(packed[row, start : start + length], alone, rtol=1e-4, atol=1e-5)
            start += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_changing_one_document_changes_no_bit_of_another(kind: dict, dtype: torch.dtype) -> None:
    model = build(**kind)
    model.compute_dtype = dtype
    ids = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(1))
    documents = documents_of(ROWS)
    before = model(ids, documents).logits
    changed = ids.clone()
    changed[0, :37] = (ids[0, :37] + 1) % 96
    after = model(changed, documents).logits
    assert not torch.equal(before[0, :37], after[0, :37])
    assert torch.equal(before[0, 37:], after[0, 37:])
    assert torch.equal(before[1], after[1])


def gradient_reach(model: HybridLM, token: int) -> torch.Tensor:
    """Return, for each position of the first row, whether its embedding affects the logits of `token`."""
    ids = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(2))
    embedded: list[torch.Tensor] = []
    hook = model.embedding.register_forward_hook(lambda _m, _i, out: embedded.append(out.requires_grad_()))
    logits = model(ids, documents_of(ROWS)).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, token].square().sum(), embedded[0])
    return gradient[0].abs().sum(-1) > 0


@pytest.mark.parametrize("token", [0, 20, 36, 37, 45, 63])
def test_a_token_sees_its_own_document_up_to_itself_only(token: int) -> None:
    start = 0 if token < 37 else 37 if token < 40 else 40
    expected = torch.zeros(64, dtype=torch.bool)
    expected[start : token + 1] = True
    assert torch.equal(gradient_reach(build(), token), expected)


def test_a_later_token_changes_no_earlier_logit() -> None:
    model = build()
    ids = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(3))
    before = model(ids).logits
    for token in (1, 17, 40, 63):
        changed = ids.clone()
        changed[0, token] = (ids[0, token] + 1) % 96
        assert torch.equal(before[:, :token], model(changed).logits[:, :token])


def test_a_convolution_tap_in_another_document_is_zero() -> None:
    x = torch.ones(1, 6, 1)
    seq = torch.tensor([[0, 0, 0, 1, 1, 1]])
    taps = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    y = convolution(x, taps, torch.zeros(1), seq)  # at these magnitudes SiLU is the identity in fp32
    assert y[0, :, 0].tolist() == [1000, 1100, 1110, 1000, 1100, 1110]
