"""Our Triton kernels of the scan equal the formulas in fp64; interpreted where there is no GPU."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import documents_of
from torch import Tensor

from fusiontree.model.triton_scan import chunk_outputs, decay_backward, decay_sums, inputs_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("H", [3, 11])  # below and above the 8 heads of one program
def test_prefix_sums_restart_in_each_document_and_chunk(H: int) -> None:
    lengths, Q = [[20, 1, 22], [16, 27]], 16
    dt, A = torch.rand(2, 43, H, generator=torch.Generator().manual_seed(0)), -torch.arange(1.0, H + 1) / 2
    seq = documents_of(lengths).seq_idx
    steps, sums = (t.cpu() for t in decay_sums(dt.to(DEVICE), A.to(DEVICE), seq.to(DEVICE), Q))
    assert steps.shape == sums.shape == (2, H, 3, Q)
    for row in range(2):
        for t in range(3 * Q):
            chunk, q = divmod(t, Q)
            value = dt[row, t] * A if t < 43 else torch.zeros(H)  # padding continues the last document
            if q > 0 and (t >= 43 or seq[row, t] == seq[row, t - 1]):
                value = value + sums[row, :, chunk, q - 1]
            torch.testing.assert_close(sums[row, :, chunk, q], value)
            torch.testing.assert_close(steps[row, :, chunk, q], dt[row, t] if t < 43 else torch.zeros(H))


def test_prefix_sums_of_a_document_do_not_depend_on_others_bitwise() -> None:
    seq = documents_of([[30, 34]]).seq_idx.to(DEVICE)
    dt, A = torch.rand(1, 64, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE), -torch.ones(4, device=DEVICE)
    other = dt.clone()
    other[:, :30] *= 1000
    before, after = (decay_sums(value, A, seq, 64)[1] for value in (dt, other))
    assert not torch.equal(before[..., :30], after[..., :30])
    assert torch.equal(before[..., 30:], after[..., 30:])


class Chunks(NamedTuple):
    """Inputs of the kernels, for two rows that end inside a chunk, and upstream gradients."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    scores: Tensor
    states: Tensor
    seq: Tensor  # [2, L]
    cut: Tensor  # [2, chunks, Q], documents; padding continues the last one
    dy: Tensor
    d_states: Tensor
    d_sums: Tensor
    d_last: Tensor
    d_decay: Tensor


def chunks_of(Q: int, H: int, G: int, P: int, S: int, lengths: list[list[int]]) -> Chunks:
    L, generator = sum(lengths[0]), torch.Generator().manual_seed(0)
    chunks = -(-L // Q)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    seq = documents_of(lengths).seq_idx.int()
    cut = torch.cat([seq, seq[:, -1:].expand(-1, chunks * Q - L)], 1).view(2, chunks, Q)
    same, first = cut[..., :, None] == cut[..., None, :], cut == cut[..., :1]
    return Chunks(
        x=normal(2, L, H, P),
        dt=torch.rand(2, L, H, generator=generator) / 3,
        A=-torch.rand(H, generator=generator) - 0.1,
        B=normal(2, L, G, S),
        C=normal(2, L, G, S),
        D=normal(H),
        scores=normal(2, chunks, G, Q, Q) * same[:, :, None],
        states=normal(2, chunks, H, P, S),
        seq=seq,
        cut=cut,
        dy=normal(2, L, H, P),
        d_states=normal(2, chunks, H, P, S),
        # other kernels read only the prefix sums of a chunk's first document, and the last sum if that fills the chunk
        d_sums=normal(2, H, chunks, Q) * first[:, None],
        d_last=normal(2, H, chunks) * first[..., -1][:, None],
        d_decay=normal(2, H, chunks, Q),
    )


def by_the_formulas(c: Chunks) -> tuple[Tensor, list[Tensor]]:
    """Compute outputs and the gradients of x, dt, A and D in fp64, from every pair of tokens."""
    x, dt, A, D = (value.double().requires_grad_() for value in (c.x, c.dt, c.A, c.D))
    L, Q, repeat = x.shape[1], c.cut.shape[2], x.shape[2] // c.B.shape[2]

    def by_chunk(value: Tensor) -> Tensor:
        value = F.pad(value.double(), (0,) * (2 * value.dim() - 3) + (-L % Q,))
        return value.unflatten(1, (-1, Q))

    steps = by_chunk(dt).permute(0, 3, 1, 2)
    decay = steps * A[:, None, None]
    seen = (c.cut[..., :, None] == c.cut[..., None, :]) & torch.ones(Q, Q).tril().bool()
    sums = torch.einsum("bcmn,bhcn->bhcm", seen.double(), decay)
    pairs = torch.exp((sums[..., :, None] - sums[..., None, :]).clamp(max=0)) * seen[:, None]
    scores = c.scores.double().repeat_interleave(repeat, 2)
    y = torch.einsum("bchmn,bhcmn,bhcn,bcnhp->bcmhp", scores, pairs, steps, by_chunk(x))
    # other kernels compute the gradients through the states, so these are detached, except for x and its time step
    before = F.pad(c.cut[:, :-1, -1], (1, 0))[..., None] == c.cut
    entering = torch.exp(sums.detach()) * before[:, None]
    C, B = (by_chunk(value.repeat_interleave(repeat, 2)) for value in (c.C, c.B))
    y = y + torch.einsum("bcmhs,bchps,bhcm->bcmhp", C, c.states.double(), entering)
    y = y.flatten(1, 2)[:, :L] + D[:, None] * x
    leaving = torch.exp((sums[..., -1:] - sums).detach()) * (c.cut == c.cut[..., -1:])[:, None]
    into = torch.einsum("bhcn,bhcn,bcnhs,bcnhp->bchps", leaving, steps, B, by_chunk(x))
    total = (y * c.dy).sum() + (into * c.d_states).sum()
    total = total + (sums * c.d_sums).sum() + (sums[..., -1] * c.d_last).sum() + (decay * c.d_decay).sum()
    return y.detach(), list(torch.autograd.grad(total, (x, dt, A, D)))


def by_the_kernels(c: Chunks, dx: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute the same as `by_the_formulas` with the kernels; the gradient of x is written to `dx`."""
    c, Q = Chunks(*(value.to(DEVICE) for value in c)), c.cut.shape[2]
    steps, sums = decay_sums(c.dt, c.A, c.seq, Q)
    y = chunk_outputs(c.x, steps, sums, c.scores, c.C, c.states, c.D, c.seq)
    d_steps, d_D, parts = inputs_backward(c.x, c.dy, steps, sums, c.scores, c.B, c.d_states, c.D, c.seq, dx)
    d_dt, d_A = decay_backward(parts, c.d_sums, c.d_last, c.d_decay, d_steps, steps, c.A, c.seq)
    return y.cpu(), [value.cpu() for value in (dx, d_dt, d_A, d_D)]


# one, two and four blocks; sizes below a tile and above the limit of one program; one and several heads per group
SHAPES = [(16, 3, 1, 8, 8), (256, 4, 2, 16, 24), (128, 3, 3, 24, 8), (32, 2, 1, 136, 264)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("Q", "H", "G", "P", "S"), SHAPES)
def test_outputs_and_gradients_of_chunks(Q: int, H: int, G: int, P: int, S: int, packed: bool) -> None:
    lengths = [[Q // 2, 1, Q + 5, 7], [Q + 3, Q // 2 + 10]]
    c = chunks_of(Q, H, G, P, S, lengths if packed else [[sum(row)] for row in lengths])
    wide = torch.zeros(*c.x.shape[:2], H * P + 5, device=DEVICE)  # the gradient is a slice of a wider buffer
    y, grads = by_the_kernels(c, wide[..., 2 : 2 + H * P].unflatten(-1, (H, P)))
    expected_y, expected = by_the_formulas(c)
    near = {
        "rtol": 0.0,
        "atol": 1e-5 if DEVICE == "cpu" else 5e-3,
    }  # relative to the largest value; a GPU multiplies in TF32
    for actual, wanted in zip([y, *grads], [expected_y, *expected], strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(actual.double() / scale, wanted / scale, **near)
    assert not wide[..., :2].any()
    assert not wide[..., 2 + H * P :].any()


@pytest.mark.parametrize("changed", [slice(0, 30), slice(100, 140)])  # before and after it, in the same chunk
def test_outputs_and_gradients_of_a_document_do_not_depend_on_others_bitwise(changed: slice) -> None:
    c = chunks_of(128, 2, 1, 16, 16, [[30, 70, 40], [100, 40]])
    other = c._replace(x=c.x.clone(), dt=c.dt.clone(), dy=c.dy.clone())
    for value in (other.x, other.dt, other.dy):
        value[0, changed] *= 1000
    before, grads = by_the_kernels(c, torch.empty_like(c.x, device=DEVICE))
    after, other_grads = by_the_kernels(other, torch.empty_like(c.x, device=DEVICE))
    assert torch.equal(before[0, 30:100], after[0, 30:100])
    for one, two in zip(grads[:2], other_grads[:2], strict=True):
        assert not torch.equal(one[0, changed], two[0, changed])
        assert torch.equal(one[0, 30:100], two[0, 30:100])
        assert torch.equal(one[1], two[1])
