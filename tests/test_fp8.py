"""FP8 products: casts, scales, gradients, refreshed weights, refused devices and widths.

Triton's interpreter halves values that round up to a power of two, so the exact tests use values that E4M3 has.
"""

import pytest
import torch
from torch import Tensor

from fusiontree.config import load_config
from fusiontree.errors import UserError
from fusiontree.kernels import check_precision
from fusiontree.model import triton_fp8
from fusiontree.model.layers import Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FITS = ["precision=fp8", "model.ssm_heads=16", "model.ssm_head_dim=16"]
LIMIT = 0.06 if DEVICE == "cuda" else 0.15  # relative error of a product of random values
ONE = torch.ones((), device=DEVICE)


def representable(rows: int, columns: int, seed: int) -> Tensor:
    """Return bf16 values ±448·2⁻ᵏ, of which each row and each column has one of magnitude 448: all scales are 1."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(0, 6, (rows, columns), generator=draw)
    signs = torch.randint(0, 2, (rows, columns), generator=draw) * 2 - 1
    powers[torch.arange(rows), torch.arange(rows) % columns] = 0
    return (448.0 * signs * 2.0**-powers).bfloat16().to(DEVICE)


def test_each_row_has_its_own_scale() -> None:
    x = representable(5, 80, 0) * torch.tensor([1.0, 2.0**-9, 2.0**9, 0.0, 1.0], device=DEVICE)[:, None].bfloat16()
    values, scales, scale = triton_fp8.cast_rows(x, 2 * ONE)
    assert torch.equal(values.float() * scales, 2 * x.float())
    assert scales.flatten().tolist() == pytest.approx([2.0, 2.0**-8, 2.0**10, 2e-12 / 448, 2.0])
    assert scale == 2.0**9  # of the greatest magnitude, without the factor


@pytest.mark.parametrize("shape", [(70, 33), (48, 32), (256, 128)])  # the first does not fill its last tiles
def test_a_weight_has_one_scale_and_both_layouts(shape: tuple[int, int]) -> None:
    weight = 4 * representable(*shape, 1).float()
    layer = Linear(shape[1], shape[0]).to(DEVICE)
    layer.weight.data = weight
    (casts,) = triton_fp8.Fp8Products([layer]).casts
    assert casts.scale == 4
    assert torch.equal(4 * casts.plain.float(), weight)
    assert torch.equal(casts.transposed.float(), casts.plain.float().t())


@pytest.mark.parametrize("shape", [(70, 33), (256, 128)])
def test_activations_are_cast_and_transposed(shape: tuple[int, int]) -> None:
    x = representable(*shape, 7)
    out = torch.empty(*reversed(shape), dtype=triton_fp8.E4M3, device=DEVICE)
    triton_fp8.cast_tiles(x, ONE, out, transposed=True)
    assert torch.equal(out.float(), x.float().t())


@pytest.mark.skipif(DEVICE != "cuda", reason="Triton's interpreter casts NaN to a number")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_becomes_nan(value: float) -> None:
    x = representable(3, 48, 2)
    x[1, 7] = value
    values, scales, _ = triton_fp8.cast_rows(x, ONE)
    assert (values.float() * scales).isnan()[1, 7]
    assert torch.equal((values.float() * scales)[[0, 2]], x.float()[[0, 2]])


def products_of(x: Tensor, weight: Tensor, gradient: Tensor, cached: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient of a linear layer in FP8."""
    layer = Linear(weight.shape[1], weight.shape[0]).to(DEVICE)
    fp8 = triton_fp8.Fp8Products([layer], cached)
    layer.weight.data = weight  # after the first cast
    fp8.refresh()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("cached", [True, False])
def test_products_of_representable_values_are_exact_sums(cached: bool) -> None:
    x, gradient = representable(64, 32, 3), representable(64, 48, 4)
    weight = representable(48, 32, 5).float()
    y, dx, dw = products_of(x.view(2, 32, 32), weight, gradient.view(2, 32, 48), cached)
    assert [y.dtype, dx.dtype, dw.dtype] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for found, left, right in ((y, x, weight.t()), (dx, gradient, weight), (dw, gradient.t(), x)):
        exact = left.double() @ right.double()
        expected, found = exact.to(torch.bfloat16), found.reshape(exact.shape).to(torch.bfloat16)
        if DEVICE == "cuda":  # its tensor cores do not keep all bits of a sum
            assert (found.double() - exact).norm() < 0.005 * exact.norm()
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("cached", [True, False])
def test_products_of_random_values_are_close(cached: bool) -> None:
    draw = torch.Generator().manual_seed(6)
    x, gradient = (torch.randn(64, size, generator=draw).bfloat16().to(DEVICE) for size in (32, 48))
    x[::5] *= 1000  # tokens of other magnitudes keep their precision in the output
    weight = torch.randn(48, 32, generator=draw).to(DEVICE)
    y, dx, dw = products_of(x, weight, gradient, cached)
    for found, left, right in ((y, x, weight.t()), (dx, gradient, weight), (dw, gradient.t(), x)):
        expected = left.double() @ right.double()
        assert (found.double() - expected).norm() < LIMIT * expected.norm()
    expected = x.double() @ weight.t().double()
    assert ((y.double() - expected).norm(dim=1) < 2 * LIMIT * expected.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.mlp_size=100"], "model.mlp_size is 100"),
        (["model.ssm_heads=24", "model.ssm_head_dim=16"], "which includes model.ssm_heads is"),
        (["model.head_dim=8"], "model.head_dim is 8"),
    ],
)
def test_a_width_that_the_hardware_refuses_is_named(overrides: list[str], named: str) -> None:
    assert load_config("tiny", FITS).precision == "fp8"
    with pytest.raises(UserError, match=f"precision fp8 needs multiples of 16, but .*{named}.*; change it or set prec"):
        load_config("tiny", [*FITS, *overrides])


@pytest.mark.skipif(DEVICE == "cuda", reason="the device is a GPU")
def test_a_machine_without_fp8_is_refused() -> None:
    with pytest.raises(
        UserError, match="precision fp8 needs a GPU of compute capability 8.9 or later, but this machine"
    ):
        check_precision("fp8", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))
