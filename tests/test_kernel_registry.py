"""The registry rejects back-ends that cannot run, `auto` skips them, and adapters respect 32-bit offsets."""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import SMALL, documents_of

from fusiontree.config.sections import KernelsConfig
from fusiontree.model import backends, kernel_registry, reference
from fusiontree.model.config import ModelConfig
from fusiontree.model.kernel_registry import BACKENDS

PACKAGES = ("mamba_ssm", "flash_attn", "liger_kernel")  # of other projects' kernels; torch itself may import triton
GPU_SHAPE = dataclasses.replace(SMALL, head_dim=32, ssm_head_dim=8, ssm_state_size=16)


def needs_absent(module: str) -> pytest.MarkDecorator:
    """Skip a test of an absent package where the package is installed."""
    return pytest.mark.skipif(importlib.util.find_spec(module) is not None, reason=f"{module} is installed here")


def test_the_configuration_has_a_key_for_each_operation() -> None:
    assert tuple(KernelsConfig.model_fields) == kernel_registry.OPERATIONS
    assert set(kernel_registry.select().names) == set(kernel_registry.OPERATIONS)
    assert all("reference" in named for named in kernel_registry.BACKENDS.values())


@pytest.mark.slow
def test_kernels_are_imported_only_when_chosen_or_checked() -> None:
    code = (
        "import sys, fusiontree.model.lm; from fusiontree.model import kernel_registry as registry\n"
        "registry.select(), registry.reference_kernels(), [registry.available(op, 'cpu') for op in registry.BACKENDS]\n"
        "own = [name for name in sys.modules if name.startswith('fusiontree.model.triton')]\n"
        f"print(own, [name for name in {PACKAGES} if name in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.stdout, result.returncode) == ("[] []\n", 0), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "name", "package"),
    [
        pytest.param("scan", "mamba_ssm", "mamba-ssm>=2.3.2,<2.4", marks=needs_absent("mamba_ssm")),
        pytest.param("attention", "flash2", "flash-attn>=2.8,<3", marks=needs_absent("flash_attn")),
        pytest.param("attention", "flash4", "flash-attn-4", marks=needs_absent("flash_attn")),
        pytest.param("loss", "liger", "liger-kernel>=0.8,<0.9", marks=needs_absent("liger_kernel")),
    ],
)
def test_an_absent_package_is_named_with_its_install_command(op: str, name: str, package: str) -> None:
    with pytest.raises(ValueError, match=f"kernels.{op} '{name}' cannot run here: ModuleNotFoundError: .*") as caught:
        kernel_registry.select({op: name}, "cuda", GPU_SHAPE, torch.bfloat16)
    assert str(caught.value).endswith(f"; pip install --no-build-isolation '{package}'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_flash_attention_4_trains_at_the_head_sizes_measured_right(head_dim: int) -> None:
    limits = kernel_registry.BACKENDS["attention"]["flash4"].limits
    assert limits(dataclasses.replace(GPU_SHAPE, head_dim=head_dim)) is None


@pytest.mark.parametrize(
    ("op", "name", "change", "words"),
    [
        ("scan", "mamba_ssm", {"chunk_size": 48}, "chunk_size 48 is not a power of two from 16 to 512"),
        ("scan", "mamba_ssm", {"ssm_head_dim": 12}, "ssm_head_dim 12 is not a multiple of 8"),
        ("scan", "mamba_ssm", {"ssm_state_size": 512}, "ssm_state_size 512 is not a multiple of 8 from 8 to 256"),
        ("convolution", "triton", {"conv_kernel": 5}, "conv_kernel 5 is above 4"),
        ("attention", "flash4", {"head_dim": 192}, "head_dim 192 is not a multiple of 32 up to 128, nor 256"),
        ("attention", "flash4", {"head_dim": 48}, "head_dim 48 is not a multiple of 32 up to 128, nor 256"),
        ("prefill", "flash4", {"head_dim": 12}, "head_dim 12 is not a multiple of 8 up to 128"),
        ("attention", "flash2", {"head_dim": 20}, "head_dim 20 is not a multiple of 8"),
        ("decode", "triton", {"head_dim": 24}, "head_dim 24 is not a power of two"),
    ],
)
def test_an_unsupported_shape_is_rejected_by_field(op: str, name: str, change: dict, words: str) -> None:
    shape = dataclasses.replace(GPU_SHAPE, **change)
    with pytest.raises(ValueError, match=f"kernels.{op} '{name}' cannot run here") as caught:
        kernel_registry.select({op: name}, "cuda", shape, torch.bfloat16)
    assert words in str(caught.value)
    assert kernel_registry.select({}, "cuda", shape, torch.bfloat16).names[op] != name


def test_an_unsupported_dtype_is_rejected() -> None:
    with pytest.raises(ValueError, match="supports bfloat16 or float16, not float32"):
        kernel_registry.select({"attention": "flash4"}, "cuda", GPU_SHAPE, torch.float32)


def test_the_environment_does_not_change_the_reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONTREE_SCAN", "mamba_ssm")  # for the GPU of the same machine
    assert set(kernel_registry.reference_kernels().names.values()) == {"reference"}


def test_on_a_cpu_auto_chooses_the_reference() -> None:
    assert set(kernel_registry.select({}, "cpu", GPU_SHAPE).names.values()) == {"reference"}
    with pytest.raises(ValueError, match="kernels.scan 'mamba_ssm' cannot run here: needs a CUDA device"):
        kernel_registry.select({"scan": "mamba_ssm"}, "cpu")


# --- 32-bit offsets --------------------------------------------------------------------------------------------------


class Counted:
    """The reference scan with the limits of a kernel with 32-bit offsets, which counts its calls."""

    calls = 0

    @classmethod
    def apply(cls, x: torch.Tensor, dt, A, B, C, D, seq, initial, Q: int) -> tuple[torch.Tensor, torch.Tensor]:
        cls.calls += 1
        for tensor in (x, B, C):
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            assert span <= backends.MAX_OFFSET
        (rows, L, H, P), (G, S) = x.shape, B.shape[2:]
        chunks = rows * math.ceil(L / Q)
        gradients, states, scores = rows * L * (H * P + 2 * G * S), chunks * H * P * S, chunks * G * Q * Q
        assert max(gradients, states, scores) <= backends.MAX_OFFSET
        first = torch.zeros(len(x), dtype=torch.int32)
        return reference.scan_chunked(x, dt, A, B, C, D, seq, initial, first, chunk_size=Q)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "limit", "least"),
    [
        *(((5, 4, 4), limit, least) for limit, least in [(10**9, 1), (2200, 2), (1300, 4), (950, 4), (550, 12)]),
        ((40, 40, 16), 26_000, 4),  # the third chunk of a row is half full, but its states take full size
    ],
)
def test_a_scan_beyond_the_limit_is_split_and_exact(
    groups: int, sizes: tuple[int, int, int], limit: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (P, S, Q), (B, L, H) = sizes, (2, 40, 6)
    draw = torch.Generator().manual_seed(0)
    joint = torch.randn(
        B, L, H * P + 2 * groups * S, generator=draw
    )  # x, B and C are views of wider rows, as in the model
    x, b, c = joint.split([H * P, groups * S, groups * S], -1)
    dt, A = torch.rand(B, L, H, generator=draw), -torch.rand(H, generator=draw)
    seq, initial = documents_of([[25, 15], [40]]).seq_idx, torch.randn(B, H, P, S, generator=draw)
    arguments = (
        *(x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (groups, S)), c.unflatten(-1, (groups, S))),
        *(torch.randn(H, generator=draw), seq, initial),
    )
    unsplit = Counted.apply(*arguments, Q)
    monkeypatch.setattr(backends, "_Scan", Counted)
    monkeypatch.setattr(backends, "MAX_OFFSET", limit)
    monkeypatch.setattr(Counted, "calls", 0)
    y, state = backends._scan_within_limits(*arguments, Q)
    assert Counted.calls >= least
    torch.testing.assert_close(y, unsplit[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, unsplit[1], rtol=1e-5, atol=1e-5)


def test_a_scan_that_cannot_be_split_enough_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_Scan", Counted)
    monkeypatch.setattr(backends, "MAX_OFFSET", 100)
    x, small = torch.randn(1, 40, 2, 5), torch.randn(1, 40, 1, 4)
    with pytest.raises(ValueError, match="shorten the rows"):
        backends._scan_within_limits(
            x, torch.rand(1, 40, 2), -torch.rand(2), small, small, torch.rand(2), torch.zeros(1, 40).int(), None, 16
        )


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, **options: object):
    """Compute the reference attention with the signature and the limits of a FlashAttention with 32-bit offsets."""
    assert all(backends._span(t) <= backends.MAX_OFFSET for t in (q, k, v))
    window = options["window_size"][0] + 1 if "window_size" in options else None
    index = torch.repeat_interleave(torch.arange(len(cu_seqlens_q) - 1), cu_seqlens_q.diff())
    documents = documents_of([index.bincount().tolist()])
    return reference.attention(q[None], k[None], v[None], documents, window)[0]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("limit", [10**9, 1919, 700])
def test_attention_beyond_the_limit_is_split_and_exact(
    window: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_of([[25, 15]])
    q, k, v = torch.randn(1, 40, 6, 8), torch.randn(1, 40, 3, 8), torch.randn(1, 40, 3, 8)
    monkeypatch.setattr(backends, "MAX_OFFSET", limit)
    result = backends._attention_by(flash)(q, k, v, documents, window)
    torch.testing.assert_close(result, reference.attention(q, k, v, documents, window), rtol=0, atol=1e-5)


def test_attention_that_cannot_be_split_enough_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_OFFSET", 500)  # below the 640 values of one group's two query heads
    q, k, v = torch.randn(1, 40, 6, 8), torch.randn(1, 40, 3, 8), torch.randn(1, 40, 3, 8)
    with pytest.raises(ValueError, match="shorten the rows"):
        backends._attention_by(flash)(q, k, v, documents_of([[25, 15]]), None)


def test_every_limit_names_a_field_of_the_model() -> None:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    impossible = dataclasses.replace(SMALL, head_dim=6, chunk_size=5, conv_kernel=9, ssm_state_size=3)
    for named in kernel_registry.BACKENDS.values():
        for backend in named.values():
            reason = backend.limits(impossible)
            assert reason is None or reason.split()[0] in fields


def test_the_packages_to_install_have_the_bounds_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    required = {re.split("[<>=]", text)[0]: text for text in project["optional-dependencies"]["cuda"]}
    named = {backend.package for backends in BACKENDS.values() for backend in backends.values()}
    bounded = {text for text in named if re.split("[<>=]", text)[0] in required}
    assert bounded == set(required.values())
