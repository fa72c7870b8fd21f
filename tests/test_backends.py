"""Every back-end that this machine can run equals the reference in fp64, and keeps documents and tokens apart.

On a machine without a GPU that is the reference itself and our Triton kernels in Triton's interpreter. Errors are
relative Euclidean norms. Tolerances: fp32 1e-5, but 2e-3 where a kernel's matrix units round to 10 bits (TF32); bf16
rounds each value to 8 bits, 4e-3, and gradients that come through two rounded factors are allowed 2e-2.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import SMALL, build, documents_of

from fusiontree.generate import PREFILL_TOKENS, Decoder
from fusiontree.model import ops, reference
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM
from fusiontree.model.pointwise import Pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = dataclasses.replace(
    SMALL,
    hidden_size=64,
    head_dim=64,
    window=48,
    ssm_head_dim=32,
    ssm_state_size=32,
    chunk_size=32,
    max_positions=256,
)
ROWS = [[75, 3, 50], [32, 33, 63]]  # past the chunk and the window; bounds on and off a chunk's
DTYPES = [torch.float32, torch.bfloat16]
GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []


def usable(op: str) -> list[object]:
    """The back-ends of `op` that can run here, in each dtype that they take."""
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=GPU)
        for dtype in DTYPES
        for name, reason in ops.available(op, DEVICE, SHAPE, dtype).items()
        if reason is None and not no_products_in(dtype, op, name)
    ]


def no_products_in(dtype: torch.dtype, op: str, name: str) -> bool:
    """Triton's interpreter multiplies the bits of bf16 matrices as if they were integers."""
    return DEVICE == "cpu" and (op, name) == ("decode", "triton") and dtype == torch.bfloat16


def backend(op: str, name: str) -> Callable[..., object]:
    return getattr(ops.select({op: name}, DEVICE), op)


def gap(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double().cpu() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(
    found: Callable[..., object],
    truth: Callable[..., object],
    inputs: list[torch.Tensor],
    tolerances: tuple[float, float],
) -> None:
    """Outputs and gradients of `found`, on the device, against those of `truth` in fp64."""
    results = []
    for function, place in ((truth, lambda t: t.double()), (found, lambda t: t.to(DEVICE))):
        leaves = [place(t).detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 2, o.numel()).view(o.shape) for o in outputs]
        total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
        results.append((outputs, torch.autograd.grad(total, leaves)))
    for part, tolerance in ((0, tolerances[0]), (1, tolerances[1])):
        gaps = [gap(f.detach(), t.detach()) for t, f in zip(results[0][part], results[1][part], strict=True)]
        assert max(gaps) < tolerance, (("outputs", "gradients")[part], gaps)


def tolerance(dtype: torch.dtype, rounds: bool) -> tuple[float, float]:
    """Of outputs and of gradients."""
    if dtype == torch.bfloat16:
        return 1e-2, 2e-2
    return (2e-3, 2e-3) if rounds and DEVICE == "cuda" else (1e-5, 1e-5)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scan_inputs(dtype: torch.dtype, L: int = 128) -> list[torch.Tensor]:
    B, H, P, G, S = 2, 4, 32, 2, 32
    dt, A = normal(B, L, H, seed=1).sigmoid() * 0.2, -normal(H, seed=2).exp()
    projections = [normal(B, L, G, S, dtype=dtype, seed=s) * 0.3 for s in (3, 4)]
    return [normal(B, L, H, P, dtype=dtype), dt, A, *projections, normal(H, seed=5), normal(B, H, P, S, seed=6)]


@pytest.mark.parametrize(("name", "dtype"), usable("scan"))
@pytest.mark.parametrize("first", [0, -1])
def test_the_scan_equals_the_reference(name: str, dtype: torch.dtype, first: int) -> None:
    seq, scan = documents_of(ROWS).seq_idx, backend("scan", name)

    def run(function: Callable[..., object], device: str) -> Callable[..., object]:
        before = torch.full((2,), first, dtype=torch.int32, device=device)
        return lambda *args: function(
            *args[:6], seq.to(device), initial_state=args[6], initial_seq=before, chunk_size=32
        )

    compare(run(scan, DEVICE), run(reference.scan_chunked, "cpu"), scan_inputs(dtype), tolerance(dtype, rounds=True))


@pytest.mark.parametrize(("name", "dtype"), usable("convolution"))
@pytest.mark.parametrize("taps", [4, 3])
def test_the_convolution_equals_the_reference(name: str, dtype: torch.dtype, taps: int) -> None:
    seq, convolution = documents_of(ROWS).seq_idx, backend("convolution", name)
    inputs = [normal(2, 128, 72, dtype=dtype), normal(40, taps, seed=1), normal(40, seed=2)]
    compare(  # a view of wider rows, as the model gives it
        lambda x, w, b: convolution(x[..., 16:56], w, b, seq.to(DEVICE)),
        lambda x, w, b: reference.convolution(x[..., 16:56], w, b, seq),
        inputs,
        tolerance(dtype, rounds=False),
    )


@pytest.mark.parametrize(("name", "dtype"), usable("attention"))
@pytest.mark.parametrize("window", [None, 48, 2])
def test_attention_equals_the_reference(name: str, dtype: torch.dtype, window: int | None) -> None:
    documents, attention = documents_of(ROWS), backend("attention", name)
    there = on_device(documents)

    def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seq, index = documents.seq_idx, torch.arange(128)
        distance = index[:, None] - index
        mask = (seq[:, :, None] == seq[:, None]) & (distance >= 0) & (distance < (window or 128))
        scores = torch.einsum("bind,bjnd->bnij", q, k.repeat_interleave(2, 2)) / 8
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bnij,bjnd->bind", weights, v.repeat_interleave(2, 2))

    inputs = [normal(2, 128, heads, 64, dtype=dtype, seed=s) for s, heads in enumerate((4, 2, 2))]
    compare(lambda q, k, v: attention(q, k, v, there, window), truth, inputs, tolerance(dtype, rounds=True))


@pytest.mark.parametrize(("name", "dtype"), usable("prefill"))
@pytest.mark.parametrize("window", [None, 48])
def test_attention_of_a_later_piece_equals_the_reference(name: str, dtype: torch.dtype, window: int | None) -> None:
    q, k, v = (normal(2, 128, heads, 64, dtype=dtype, seed=s) for s, heads in enumerate((4, 2, 2)))
    truth = reference.attention(*(t.double() for t in (q, k, v)), Documents.whole_rows(2, 128, "cpu"), window)
    keys = slice(0 if window is None else 90 - window, None)
    found = backend("prefill", name)(*(t.to(DEVICE) for t in (q[:, 90:], k[:, keys], v[:, keys])), window)
    assert gap(found, truth[:, 90:]) < tolerance(dtype, rounds=True)[0]


@pytest.mark.parametrize(("name", "dtype"), usable("decode"))
def test_decoding_attention_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    decode = backend("decode", name)
    q, k, v = (normal(2, t, heads, 64, dtype=dtype, seed=t) for t, heads in ((1, 4), (300, 2), (301, 2)))
    v = v[:, :300]
    visible = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) > 0.3
    visible[:, 250:], visible[1, :150] = False, False  # whole stretches unseen
    arguments = [t.to(DEVICE) for t in (q, k, v, visible, torch.tensor([250]))]
    truth = reference.decode_attention(*(t.double() for t in (q, k, v)), visible, torch.tensor([250]))
    assert gap(decode(*arguments), truth) < tolerance(dtype, rounds=True)[0]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("name", "dtype"), usable("loss"))
def test_the_loss_head_equals_the_reference(name: str, dtype: torch.dtype, z_loss: float) -> None:
    labels = torch.randint(200, (128,), generator=torch.Generator().manual_seed(0))
    labels[::5] = reference.IGNORE
    loss = backend("loss", name)
    compare(
        lambda h, w: loss(h, w, labels.to(DEVICE), z_loss)[0],
        lambda h, w: (
            torch.nn.functional.cross_entropy(h @ w.T, labels, ignore_index=-100, reduction="sum")
            + z_loss * (h @ w.T).logsumexp(-1)[labels != -100].square().sum()
        ),
        [normal(128, 64, dtype=dtype), normal(200, 64, seed=1) * 0.1],
        tolerance(dtype, rounds=True),
    )


def pieces() -> dict[str, tuple[list[torch.Tensor], tuple[object, ...]] | None]:
    """By piece: what it is compared on, leaves and the rest; None: by the tests of the whole model."""
    x, y, z = (normal(2, 128, 64, seed=s) for s in range(3))
    rotary = tuple(t.to(DEVICE) for t in (normal(2, 128, 1, 32).cos(), normal(2, 128, 1, 32).sin()))
    real = torch.ones(2, 128, dtype=torch.bool, device=DEVICE)
    weight = normal(64, seed=4)
    return {
        "add_norm": ([x, y, weight], (1e-5,)),
        "norm_with_time": ([x, y, weight], (1e-5,)),
        "attention_inputs": ([normal(2, 128, 8 * 64), normal(64, seed=1), normal(64, seed=2)], (rotary, 1e-5, [1, 1])),
        "joined_norm": None,
        "time_step": ([x, weight], ()),
        "gated_norm": ([x, y, weight], (1e-5,)),
        "mamba_step": None,
        "remember": None,
        "fuse": ([x, y, z, normal(8, 128, seed=7), normal(64, 8, seed=8), weight, normal(64, seed=9)], (real, 1e-5)),
        "swiglu": ([x], ()),
    }


def test_every_compiled_piece_is_compared() -> None:
    assert set(pieces()) == set(Pointwise._fields)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the compiled pieces are for GPUs")
@pytest.mark.parametrize("name", [name for name, piece in pieces().items() if piece is not None])
def test_compiled_pieces_equal_their_functions(name: str) -> None:
    tensors, rest = pieces()[name]
    compiled, plain = getattr(ops.select(device_type=DEVICE).pointwise, name), getattr(Pointwise(), name)
    if name == "fuse":  # its gate is a tuple
        compiled, plain = (
            lambda x, m, a, down, up, bias, weight, real, eps, f=f: f(x, m, a, (down, up, bias), real, weight, eps)
            for f in (compiled, plain)
        )

    def flat(outputs: object) -> tuple[torch.Tensor, ...]:
        if isinstance(outputs, torch.Tensor):
            return (outputs,)
        return tuple(t for o in outputs for t in flat(o))

    results = []
    for function in (plain, compiled):
        leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
        outputs = flat(function(*leaves, *rest))
        total = sum((o * torch.linspace(-1, 2, o.numel(), device=DEVICE).view(o.shape)).sum() for o in outputs)
        results.append((*outputs, *torch.autograd.grad(total, leaves)))
    for plainly, fast in zip(*results, strict=True):
        assert gap(fast.detach(), plainly.detach().double().cpu()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a large GPU")
@torch.inference_mode()
def test_a_scan_beyond_32_bit_offsets_is_split_and_right() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB")
    L, H, P, S, last = 540_672, 64, 64, 128, 1000
    assert L * H * P > 2**31
    scan = backend("scan", "mamba_ssm")
    x = torch.randn(1, L, H, P, device=DEVICE, dtype=torch.bfloat16)
    dt, A = torch.rand(1, L, H, device=DEVICE) * 0.1, -torch.rand(H, device=DEVICE)
    B, C = (torch.randn(1, L, 1, S, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seq = (torch.arange(L, device=DEVICE) >= L - last).int()[None]
    y, state = scan(x, dt, A, B, C, torch.ones(H, device=DEVICE), seq, chunk_size=256)
    tail = [t[:, -last:].contiguous() for t in (x, dt, B, C)]
    y_tail, state_tail = scan(
        tail[0], tail[1], A, *tail[2:], torch.ones(H, device=DEVICE), seq[:, -last:] * 0, chunk_size=256
    )
    assert gap(y[:, -last:], y_tail.double().cpu()) < 1e-2  # its chunks begin elsewhere
    assert gap(state, state_tail.double().cpu()) < 1e-2


# --- the whole model on every back-end -------------------------------------------------------------------------------


def on_device(documents: Documents) -> Documents:
    return Documents.from_seq_idx(documents.seq_idx.to(DEVICE))


def choices() -> list[object]:
    """The back-ends that `auto` takes here, and each other one beside them."""
    found = []
    for dtype in DTYPES:
        automatic = ops.select({}, DEVICE, SHAPE, dtype).names
        found.append(pytest.param({}, dtype, id=f"auto-{str(dtype)[6:]}", marks=GPU))
        for op in ops.OPS:
            for name, reason in ops.available(op, DEVICE, SHAPE, dtype).items():
                if reason is None and name != automatic[op] and not no_products_in(dtype, op, name):
                    found.append(pytest.param({op: name}, dtype, id=f"{op}-{name}-{str(dtype)[6:]}", marks=GPU))
    return found


def model_with(requested: dict[str, str], dtype: torch.dtype) -> HybridLM:
    kernels = ops.select(requested, DEVICE, SHAPE, dtype)
    changes = {f.name: getattr(SHAPE, f.name) for f in dataclasses.fields(ModelConfig)}
    return build(kernels=kernels, dtype=dtype, **changes).to(DEVICE)


@pytest.mark.parametrize(("requested", "dtype"), choices())
@torch.inference_mode()
def test_documents_are_apart_to_the_last_bit_and_as_if_alone(requested: dict[str, str], dtype: torch.dtype) -> None:
    model = model_with(requested, dtype)
    ids = torch.randint(96, (2, 128), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    documents = on_device(documents_of(ROWS))
    before = model(ids, documents).logits
    changed = ids.clone()
    changed[0, :75] = (ids[0, :75] + 1) % 96
    after = model(changed, documents).logits
    assert not torch.equal(before[0, :75], after[0, :75])
    assert torch.equal(before[0, 75:], after[0, 75:])
    assert torch.equal(before[1], after[1])
    alone = model(ids[:1, 78:]).logits[0]
    assert gap(before[0, 78:], alone.double().cpu()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize(("requested", "dtype"), choices())
@torch.inference_mode()
def test_a_later_token_changes_no_earlier_logit(requested: dict[str, str], dtype: torch.dtype) -> None:
    model = model_with(requested, dtype)
    ids = torch.randint(96, (1, 128), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    before = model(ids).logits
    for token in (1, 33, 80, 127):
        changed = ids.clone()
        changed[0, token] = (ids[0, token] + 1) % 96
        assert torch.equal(before[:, :token], model(changed).logits[:, :token])


@pytest.mark.parametrize(("requested", "dtype"), choices())
@pytest.mark.parametrize("padding", [(0, 60, 20), (0, 0, 0)])
@torch.inference_mode()
def test_decoding_step_by_step_equals_the_full_forward(
    padding: tuple[int, ...], requested: dict[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREFILL_TOKENS, DEVICE, 3 * 30)  # the prompt's 70 tokens come in three pieces
    model = model_with(requested, dtype)
    ids = torch.randint(96, (3, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = torch.arange(128, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]
    whole = model(ids, Documents.from_mask(mask)).logits
    end = 128 if DEVICE == "cuda" else 86  # Triton's interpreter takes a second a token
    decoder = Decoder(model, 3, room=80)  # less than there will be: the cache moves on the way
    steps = [decoder.prefill(ids[:, :70], mask[:, :70])]
    steps += [decoder.step(ids[:, t]).clone() for t in range(70, end)]
    stepped = torch.stack(steps, 1)
    assert decoder.cache.length == end
    assert gap(stepped[:, :-1], whole[:, 69 : end - 1].double().cpu()) < (2e-2 if dtype == torch.bfloat16 else 2e-3)
