"""Every back-end that this machine can run equals the reference in fp64, and isolates documents and tokens.

Without a GPU these are the reference itself and our Triton kernels in Triton's interpreter. Errors are relative
Euclidean norms. Tolerances: fp32 1e-5, but 2e-3 where matrix units round to 10 bits (TF32); bf16 rounds each value to 8
bits, 4e-3, so outputs may differ by 1e-2 and gradients, products of two rounded factors, by 2e-2.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import SMALL, build, documents_of

from fusiontree.inference.decoder import PREFILL_TOKENS, Decoder
from fusiontree.model import kernel_registry, reference
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM
from fusiontree.model.loss import IGNORE
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
ROWS = [[75, 3, 50], [32, 33, 63]]  # longer than chunk and window; boundaries on and off chunk boundaries
DTYPES = [torch.float32, torch.bfloat16]
GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []


def usable(op: str) -> list[object]:
    """Return the back-ends of `op` that can run here, with each dtype that they support."""
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=GPU)
        for dtype in DTYPES
        for name, reason in kernel_registry.available(op, DEVICE, SHAPE, dtype).items()
        if reason is None and not no_products_in(dtype, op, name)
    ]


def no_products_in(dtype: torch.dtype, op: str, name: str) -> bool:
    """Return whether to skip a case: Triton's interpreter multiplies the bits of bf16 matrices as integers."""
    return DEVICE == "cpu" and (op, name) == ("decode", "triton") and dtype == torch.bfloat16


def backend(op: str, name: str) -> Callable[..., object]:
    return getattr(kernel_registry.select({op: name}, DEVICE), op)


def gap(found: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.cpu()
    return float((found.double().cpu() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(
    found: Callable[..., object],
    truth: Callable[..., object],
    inputs: list[torch.Tensor],
    tolerances: tuple[float, float],
) -> None:
    """Compare outputs and gradients of `found`, on the device, with those of `truth` in fp64."""
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
    """Return the tolerances of outputs and gradients; `rounds`: fp32 matrix products are in TF32."""
    if dtype == torch.bfloat16:
        return 1e-2, 2e-2
    return (2e-3, 2e-3) if rounds and DEVICE == "cuda" else (1e-5, 1e-5)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scan_inputs(dtype: torch.dtype, L: int, P: int = 32, S: int = 32) -> list[torch.Tensor]:
    B, H, G = 2, 4, 2
    dt, A = normal(B, L, H, seed=1).sigmoid() * 0.2, -normal(H, seed=2).exp()
    projections = [normal(B, L, G, S, dtype=dtype, seed=s) * 0.3 for s in (3, 4)]
    return [normal(B, L, H, P, dtype=dtype), dt, A, *projections, normal(H, seed=5), normal(B, H, P, S, seed=6)]


@pytest.mark.parametrize(("name", "dtype"), usable("scan"))
@pytest.mark.parametrize(("first", "length"), [(0, 128), (-1, 117)])  # the second length ends inside a chunk
def test_scan_equals_the_reference(name: str, dtype: torch.dtype, first: int, length: int) -> None:
    compare_scan(name, dtype, documents_of(ROWS).seq_idx[:, :length], first, chunk_size=32)


def compare_scan(name: str, dtype: torch.dtype, seq: torch.Tensor, first: int, chunk_size: int, **sizes: int) -> None:
    """Compare the scan on rows of documents `seq`, after an initial state of document `first`."""

    def run(function: Callable[..., object], device: str) -> Callable[..., object]:
        before = torch.full((2,), first, dtype=torch.int32, device=device)
        return lambda *args: function(
            *args[:6], seq.to(device), initial_state=args[6], initial_seq=before, chunk_size=chunk_size
        )

    inputs = scan_inputs(dtype, seq.shape[1], **sizes)
    scan = backend("scan", name)
    compare(run(scan, DEVICE), run(reference.scan_chunked, "cpu"), inputs, tolerance(dtype, rounds=True))


@pytest.mark.parametrize(("name", "dtype"), usable("convolution"))
@pytest.mark.parametrize(
    ("taps", "rows", "channels"),
    [
        (4, ROWS, 40),
        (3, ROWS, 40),
        # two programs across 128 channels; along the row, nine of 32 tokens forward and three of 128 backward
        (4, [[140, 1, 139]], 150),
        (4, [[31, 97, 5], [30, 97, 6]], 40),  # documents that start just before a program's first token
    ],
)
def test_convolution_equals_the_reference(
    name: str, dtype: torch.dtype, taps: int, rows: list[list[int]], channels: int
) -> None:
    seq, convolution = documents_of(rows).seq_idx, backend("convolution", name)
    wide, part = normal(*seq.shape, channels + 32, dtype=dtype), slice(16, 16 + channels)
    inputs = [wide, normal(channels, taps, seed=1), normal(channels, seed=2)]
    compare(  # a view of wider rows, as in the model
        lambda x, w, b: convolution(x[..., part], w, b, seq.to(DEVICE)),
        lambda x, w, b: reference.convolution(x[..., part], w, b, seq),
        inputs,
        tolerance(dtype, rounds=False),
    )


@pytest.mark.parametrize(("name", "dtype"), usable("convolution"))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("changed", ["input", "gradient"])
def test_convolution_isolates_documents_from_any_value(
    name: str, dtype: torch.dtype, value: float, changed: str
) -> None:
    lengths = [1, 30, 2, 40, 54, 3, 10]
    copies = 1 + len(lengths)  # of eight channels each, which a depthwise convolution computes independently
    seq, convolution = documents_of([lengths]).seq_idx.to(DEVICE), backend("convolution", name)
    weight, bias = normal(8, 4, seed=1).repeat(copies, 1).to(DEVICE), normal(8, seed=2).repeat(copies).to(DEVICE)
    tensors = {"input": normal(1, 140, 8, dtype=dtype), "gradient": normal(1, 140, 8, dtype=dtype, seed=3)}
    tensors = {name: tensor.repeat(1, 1, copies) for name, tensor in tensors.items()}
    in_document = [seq[0].cpu() == document for document in range(len(lengths))]
    for document, there in enumerate(in_document):  # changed in a copy of its own; the first copy stays as it is
        tensors[changed].unflatten(-1, (copies, 8))[0, there, 1 + document] = value
    x = tensors["input"].to(DEVICE).requires_grad_()
    y = convolution(x, weight, bias, seq)
    (dx,) = torch.autograd.grad(y, x, tensors["gradient"].to(DEVICE))
    for found in (y.detach(), dx):
        unchanged, *others = found[0].unflatten(-1, (copies, 8)).unbind(1)
        for there, other in zip(in_document, others, strict=True):
            assert torch.equal(unchanged[~there], other[~there])


@pytest.mark.parametrize(("name", "dtype"), usable("attention"))
@pytest.mark.parametrize("window", [None, 48, 2])
def test_attention_equals_the_reference(name: str, dtype: torch.dtype, window: int | None) -> None:
    compare_attention(name, dtype, window)


def compare_attention(name: str, dtype: torch.dtype, window: int | None, N: int = 4, D: int = 64) -> None:
    documents, attention = documents_of(ROWS), backend("attention", name)
    there = on_device(documents)

    def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seq, index = documents.seq_idx, torch.arange(128)
        distance = index[:, None] - index
        mask = (seq[:, :, None] == seq[:, None]) & (distance >= 0) & (distance < (window or 128))
        scores = torch.einsum("bind,bjnd->bnij", q, k.repeat_interleave(N // 2, 2)) / D**0.5
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bnij,bjnd->bind", weights, v.repeat_interleave(N // 2, 2))

    inputs = [normal(2, 128, heads, D, dtype=dtype, seed=s) for s, heads in enumerate((N, 2, 2))]
    compare(lambda q, k, v: attention(q, k, v, there, window), truth, inputs, tolerance(dtype, rounds=True))


@pytest.mark.parametrize(("name", "dtype"), usable("prefill"))
@pytest.mark.parametrize("window", [None, 48])
def test_prefill_equals_the_reference(name: str, dtype: torch.dtype, window: int | None) -> None:
    compare_prefill(name, dtype, window)


def compare_prefill(name: str, dtype: torch.dtype, window: int | None, N: int = 4, D: int = 64) -> None:
    q, k, v = (normal(2, 128, heads, D, dtype=dtype, seed=s) for s, heads in enumerate((N, 2, 2)))
    truth = reference.attention(*(t.double() for t in (q, k, v)), Documents.one_per_row(2, 128, "cpu"), window)
    keys = slice(0 if window is None else 90 - window, None)
    found = backend("prefill", name)(*(t.to(DEVICE) for t in (q[:, 90:], k[:, keys], v[:, keys])), window)
    assert gap(found, truth[:, 90:]) < tolerance(dtype, rounds=True)[0]


@pytest.mark.parametrize(("name", "dtype"), usable("decode"))
@pytest.mark.parametrize("rows", [2, 40])  # the cache split among programs; several blocks per program
def test_decode_equals_the_reference(name: str, dtype: torch.dtype, rows: int) -> None:
    compare_decode(name, dtype, rows)


def compare_decode(name: str, dtype: torch.dtype, rows: int, N: int = 4, D: int = 64) -> None:
    decode = backend("decode", name)
    q, k, v = (normal(rows, t, heads, D, dtype=dtype, seed=t) for t, heads in ((1, N), (300, 2), (301, 2)))
    v = v[:, :300]
    q = torch.cat([q, q], 2)[:, :, N:]  # a slice of a wider projection
    visible = torch.rand(rows, 300, generator=torch.Generator().manual_seed(0)) > 0.3
    visible[:, 250:], visible[1, :150] = False, False  # splits without a visible key
    arguments = [t.to(DEVICE) for t in (q, k, v, visible, torch.tensor([250]))]
    truth = reference.decode_attention(*(t.double() for t in (q, k, v)), visible, torch.tensor([250]))
    assert gap(decode(*arguments), truth) < tolerance(dtype, rounds=True)[0]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("name", "dtype"), usable("loss"))
def test_loss_equals_the_reference(name: str, dtype: torch.dtype, z_loss: float) -> None:
    labels = torch.randint(200, (128,), generator=torch.Generator().manual_seed(0))
    labels[::5] = IGNORE
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


PointwiseCase = tuple[list[torch.Tensor], Callable[..., object]]  # leaves, and a call of the function with them


def pointwise_cases(dtype: torch.dtype) -> dict[str, list[PointwiseCase]]:
    """Return test cases by pointwise function, activations in `dtype`; empty: covered by tests of the model."""
    x, y, z = (normal(2, 128, 64, dtype=dtype, seed=s) for s in range(3))
    rotary = tuple(t.to(DEVICE) for t in (normal(2, 128, 1, 32).cos(), normal(2, 128, 1, 32).sin()))
    real = torch.arange(128, device=DEVICE).expand(2, -1) < 100
    weight, bias = normal(64, seed=4), normal(64, seed=9)
    down, up, up_token = (
        normal(*shape, seed=7) * 0.1 for shape in ((8, 128), (64, 8), (1, 8))
    )  # magnitudes as in a model
    gates = [[down, up, bias], [down, up_token, bias[:1]], [bias], []]  # by channel, by token, static, none
    heads = [normal(2, 128, n, 8, dtype=dtype, seed=n) for n in (3, 5)]
    return {
        "add_norm": [([x, y, weight], lambda f, *t: f(*t, 1e-5))],
        "norm_with_time": [([x, y, weight], lambda f, *t: f(*t, 1e-5))],
        "attention_inputs": [
            (
                [normal(2, 128, 8 * 64, dtype=dtype), normal(64, seed=1), normal(64, seed=2)],
                lambda f, *t: f(*t, rotary, 1e-5, [1, 1]),
            )
        ],
        "joined_norm": [([*heads, weight], lambda f, a, b, w: f([a, b], w, 1e-5))],
        "time_step": [([x, weight], lambda f, *t: f(*t))],
        "gated_norm": [([x, y, weight], lambda f, *t: f(*t, 1e-5))],
        "mamba_step": [],
        "write_kv": [],
        "fuse": [([x, y, z, weight, *gate], partial(fuse, real=counted)) for gate in gates for counted in (real, None)],
        "swiglu": [([x], lambda f, *t: f(*t))],
    }


def test_every_pointwise_function_has_cases() -> None:
    cases = pointwise_cases(torch.float32)
    assert set(cases) == set(Pointwise._fields)
    for name, calls in cases.items():
        for leaves, call in calls:
            assert flat(call(getattr(Pointwise(), name), *(t.to(DEVICE) for t in leaves)))


def fuse(f: Callable[..., object], x: torch.Tensor, m: torch.Tensor, *rest: torch.Tensor, real: object) -> object:
    a, weight, *gate = rest
    return f(x, m, a, (*[None] * (3 - len(gate)), *gate), real, weight, 1e-5)


def flat(outputs: object) -> tuple[torch.Tensor, ...]:
    """Return all tensors of nested tuples and lists, in order."""
    if outputs is None or isinstance(outputs, torch.Tensor):
        return () if outputs is None else (outputs,)
    return tuple(t for o in outputs for t in flat(o))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="compiled functions are for GPUs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, calls in pointwise_cases(torch.float32).items() if calls])
def test_compiled_functions_equal_uncompiled_ones(name: str, dtype: torch.dtype) -> None:
    compiled, plain = getattr(kernel_registry.select(device_type=DEVICE).pointwise, name), getattr(Pointwise(), name)
    for leaves, call in pointwise_cases(dtype)[name]:
        compare(
            lambda *t, call=call: flat(call(compiled, *t)),
            lambda *t, call=call: flat(call(plain, *(value.to(DEVICE) for value in t))),
            leaves,
            tolerance(dtype, rounds=False),
        )


def edges() -> list[object]:
    """Return the back-ends that can run here, with the smallest, the largest and an odd shape within their limits."""
    scans = [(16, 8, 8), (512, 256, 256), (256, 256, 256), (512, 64, 128), (64, 24, 200)]
    changes = {"scan": [{"chunk_size": Q, "ssm_head_dim": P, "ssm_state_size": S} for Q, P, S in scans]}
    heads = [  # two or sixteen query heads per key-value head
        {"head_dim": D, "num_heads": N, "global_heads": N // 2}
        for D, N in [*((D, 4) for D in (6, *range(8, 136, 8), 256)), (64, 32), (256, 32)]
    ]
    changes |= dict.fromkeys(("attention", "prefill", "decode"), heads)
    return [
        pytest.param(op, name, change, dtype, id=f"{op}-{name}-{'-'.join(map(str, change.values()))}-{str(dtype)[6:]}")
        for op, shapes in changes.items()
        for change in shapes
        for dtype in DTYPES
        for name, reason in kernel_registry.available(op, DEVICE, dataclasses.replace(SHAPE, **change), dtype).items()
        if reason is None and DEVICE == "cuda"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name", "change", "dtype"), edges())
def test_every_shape_within_the_limits_runs(op: str, name: str, change: dict[str, int], dtype: torch.dtype) -> None:
    if op == "scan":
        rows = documents_of([[150, 3, 103], [128, 128]] if change["chunk_size"] < 256 else [[700, 3, 321], [512, 512]])
        sizes = {"P": change["ssm_head_dim"], "S": change["ssm_state_size"]}
        compare_scan(name, dtype, rows.seq_idx, 0, chunk_size=change["chunk_size"], **sizes)
    elif op == "decode":
        compare_decode(name, dtype, 2, change["num_heads"], change["head_dim"])
    else:
        equals = compare_attention if op == "attention" else compare_prefill
        equals(name, dtype, 48, change["num_heads"], change["head_dim"])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a large GPU")
@torch.inference_mode()
def test_a_scan_beyond_32_bit_offsets_is_split_and_exact() -> None:
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
    assert gap(y[:, -last:], y_tail.double().cpu()) < 1e-2  # its chunks start at other tokens
    assert gap(state, state_tail.double().cpu()) < 1e-2


# --- the model on every back-end -------------------------------------------------------------------------------------


def on_device(documents: Documents) -> Documents:
    return Documents.from_seq_idx(documents.seq_idx.to(DEVICE))


def choices() -> list[object]:
    """Return the back-ends that `auto` chooses here, and every single deviation from them."""
    params = []
    for dtype in DTYPES:
        automatic = kernel_registry.select({}, DEVICE, SHAPE, dtype).names
        params.append(pytest.param({}, dtype, id=f"auto-{str(dtype)[6:]}", marks=GPU))
        for op in kernel_registry.OPERATIONS:
            for name, reason in kernel_registry.available(op, DEVICE, SHAPE, dtype).items():
                if reason is None and name != automatic[op] and not no_products_in(dtype, op, name):
                    params.append(pytest.param({op: name}, dtype, id=f"{op}-{name}-{str(dtype)[6:]}", marks=GPU))
    return params


def model_with(requested: dict[str, str], dtype: torch.dtype) -> HybridLM:
    kernels = kernel_registry.select(requested, DEVICE, SHAPE, dtype)
    changes = {f.name: getattr(SHAPE, f.name) for f in dataclasses.fields(ModelConfig)}
    return build(kernels=kernels, dtype=dtype, **changes).to(DEVICE)


@pytest.mark.parametrize(("requested", "dtype"), choices())
@torch.inference_mode()
def test_documents_are_isolated_bitwise_and_equal_those_alone(requested: dict[str, str], dtype: torch.dtype) -> None:
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
@torch.inference_mode()
def test_padding_changes_no_real_logit_and_all_is_finite_in_its_dtype(
    requested: dict[str, str], dtype: torch.dtype
) -> None:
    model, streams = model_with(requested, dtype), set()
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: streams.add(output[0].dtype))
    ids = torch.randint(96, (3, 80), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    mask = torch.arange(80, device=DEVICE) >= torch.tensor([0, 50, 80], device=DEVICE)[:, None]
    before = model(ids, Documents.from_mask(mask.int())).logits
    after = model(torch.where(mask, ids, (ids + 1) % 96), Documents.from_mask(mask)).logits
    assert before.isfinite().all()
    assert torch.equal(before[mask], after[mask])
    alone = model(ids[1:2, 50:]).logits[0]
    assert gap(before[1, 50:], alone.double().cpu()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    decoder = Decoder(model, 3, room=80)
    assert decoder.prefill(ids[:, :78], mask[:, :78]).isfinite().all()
    assert all(decoder.step(ids[:, t]).isfinite().all() for t in (78, 79))
    assert streams == {dtype}


@pytest.mark.parametrize(("requested", "dtype"), choices())
@pytest.mark.parametrize(
    ("padding", "piece"), [((0, 60, 20), 30), ((0, 0, 0), 30), ((0, 69, 67), 128)]
)  # the last: row by row, each prompt in one chunk
@torch.inference_mode()
def test_prefill_and_decoding_equal_the_full_forward(
    padding: tuple[int, ...], piece: int, requested: dict[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREFILL_TOKENS, DEVICE, 3 * piece)
    model = model_with(requested, dtype)
    ids = torch.randint(96, (3, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = torch.arange(128, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]
    full = model(ids, Documents.from_mask(mask)).logits
    end = 128 if DEVICE == "cuda" else 77  # Triton's interpreter takes a second per token
    decoder = Decoder(model, 3, room=80)  # smaller than needed: the cache is reallocated on the way
    steps = [decoder.prefill(ids[:, :70], mask[:, :70])]
    steps += [decoder.step(ids[:, t]).clone() for t in range(70, end)]
    stepped = torch.stack(steps, 1)
    assert decoder.cache.length == end
    assert gap(stepped[:, :-1], full[:, 69 : end - 1].double().cpu()) < (2e-2 if dtype == torch.bfloat16 else 2e-3)
