"""`fxopt::linear_fp8`: against a float64 emulation of the number format, and what has no range or is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxopt.ir.op import all_ops
from fxopt.ir.ops.linear_fp8 import linear_fp8, row_steps, to_e4m3
from fxopt.passes.quantize_linear.float8 import quantize_weight_fp8


def emulated(x: Tensor) -> Tensor:
    """float64 numbers on the grid of E4M3: 3 bits behind the point, exponents from -6, saturated at 448, ties even."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    unit = torch.exp2(exponent - 3)
    return (torch.round(x / unit) * unit).clamp(-448, 448)


def test_rounding_is_that_of_the_specification() -> None:
    grid = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 20000)
    assert torch.equal(to_e4m3(grid, 1.0).double(), emulated(grid.double()))
    ties = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 464.0, 1e30])
    assert to_e4m3(ties, 1.0).tolist() == [16.0, 20.0, 0.0, 2.0**-8, 448.0, 448.0]


def test_agrees_with_a_float64_computation() -> None:
    """Sums in float32 differ from exact ones by at most one rounding per product of their magnitudes."""
    for x, codes, scales, bias, x_scale in linear_fp8.sample_arguments():
        result = linear_fp8(x, codes, scales, bias, x_scale)
        assert result.shape == (*x.shape[:-1], len(codes)) and result.dtype == x.dtype
        step = (row_steps(x) if x_scale is None else torch.tensor(x_scale)).double()
        levels = emulated((x / step.float()).double())
        scaled = step * scales.double()
        exact = levels @ codes.double().t() * scaled + (0 if bias is None else bias.double())
        magnitude = levels.abs() @ codes.double().abs().t() * scaled + (0 if bias is None else bias.double().abs())
        assert bool(((result - exact).abs() <= (x.shape[-1] + 4) * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    for x, codes, scales, bias, x_scale in linear_fp8.sample_arguments():
        low = x.to(dtype)
        expected = linear_fp8(low.float(), codes, scales, bias, x_scale).to(dtype)
        assert torch.equal(linear_fp8(low, codes, scales, bias, x_scale), expected)


def test_fake_rule_agrees_with_the_definition() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for arguments in all_ops()["linear_fp8"].sample_arguments():
        result = linear_fp8(*arguments)
        with FakeTensorMode() as mode:
            shaped = linear_fp8(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        assert (shaped.shape, shaped.dtype) == (result.shape, result.dtype)


def test_zeros_infinities_and_nan() -> None:
    x = torch.ones(5, 16)
    x[0], x[1, 3], x[2, 5] = 0.0, math.inf, math.nan
    x[4] = 1e-42
    codes, scales = quantize_weight_fp8(torch.eye(16)[:3] + 0.5)
    bias = torch.tensor([1.0, 2.0, 3.0])
    dynamic = linear_fp8(x, codes, scales, bias, None)
    assert torch.equal(dynamic[0], bias), "a row of zeros has no range"
    assert bool(dynamic[1].isnan().all()) and bool(dynamic[2].isnan().all()), "what is not finite is not hidden"
    assert bool(dynamic[3].isfinite().all()) and torch.equal(dynamic[4], bias)
    static = linear_fp8(x, codes, scales, bias, 0.01)
    assert bool(static[1].isfinite().all()) and bool(static[2].isnan().all())


def test_what_is_above_a_static_range_saturates() -> None:
    codes, scales = torch.ones(1, 1).to(torch.float8_e4m3fn), torch.ones(1)
    x = torch.tensor([[3.0], [4.48], [1000.0], [-1000.0]])
    assert torch.allclose(linear_fp8(x, codes, scales, None, 0.01).flatten(), torch.tensor([2.88, 4.48, 4.48, -4.48]))


def test_weights_fill_the_range_per_output() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0.0
    codes, scales = quantize_weight_fp8(weight)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (7,)
    largest = codes.float().abs().amax(1)
    assert largest.tolist() == [448.0] * 3 + [0.0] + [448.0] * 3
    back = codes.float() * scales[:, None]
    assert bool(((back - weight).abs() <= weight.abs() * 2.0**-4 + scales[:, None] * 2.0**-10).all())
