"""2:4 weights and weights of powers of two: what is packed comes back, and the operators are linears of it."""

from __future__ import annotations

import pytest
import torch

from fxopt.errors import InvalidInput
from fxopt.ir.op import all_ops
from fxopt.ir.ops.linear_24 import compress_24, expand_24, linear_24
from fxopt.ir.ops.linear_shift import linear_shift, shift_codes, shift_values
from fxopt.ir.packing import pack, unpack


def sparse(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight with at most two of four values, here and there fewer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns // 4, 4, generator=generator)
    order = torch.rand(out, columns // 4, 4, generator=generator).argsort(-1)
    weight[order >= 2] = 0
    weight[::3, ::2, 0] = 0
    return weight.reshape(out, columns)


def test_two_of_four_come_back() -> None:
    weight = sparse(9, 64)
    values, places = compress_24(weight)
    assert values.shape == (9, 32) and places.shape == (9, 8) and places.dtype == torch.uint8
    assert torch.equal(expand_24(values, places), weight)
    first, second = (places[0, 0] & 3).item(), (places[0, 0] >> 2 & 3).item()
    assert first < second


def test_three_of_four_are_refused() -> None:
    with pytest.raises(InvalidInput, match="more than two of four"):
        compress_24(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    with pytest.raises(InvalidInput, match="has 12 inputs; expected a multiple of 8"):
        compress_24(torch.zeros(2, 12))


@pytest.mark.parametrize("name", ["linear_24", "linear_shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_are_linears(name: str, dtype: torch.dtype) -> None:
    declared = all_ops()[name]
    for x, packed, extra, *rest in declared.sample_arguments():
        if name == "linear_24":
            (bias,) = rest
            packed = packed.to(dtype)
            weight, given = expand_24(packed, extra), (x.to(dtype), packed, extra, bias)
        else:
            bias, columns, group = rest
            weight = shift_values(unpack(packed, 4, columns)) * extra.repeat_interleave(group, 1)[:, :columns]
            given = (x.to(dtype), packed, extra, bias, columns, group)
        expected = torch.nn.functional.linear(x.to(dtype).double(), weight.double(), None if bias is None else bias.double())
        result = declared(*given)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=4e-3 if dtype == torch.float16 else 1e-5, atol=1e-2)


def test_work() -> None:
    """Half of the multiplications of a dense weight; the bytes that are moved."""
    values, places = compress_24(sparse(8, 64))
    cost = linear_24.cost_of(torch.zeros(4, 64), values, places, None)
    assert cost.macs == 4 * 8 * 32 and cost.bytes == 4 * (64 + 8) * 4 + values.nbytes + places.nbytes
    codes, scales = shift_codes(torch.randn(8, 64), 32)
    form = dict(linear_shift.cost_of(torch.zeros(4, 64), pack(codes, 4), scales, None, 64, 32).form)
    assert form == {"op": "linear_shift", "rows": 4, "out": 8, "in": 64, "bits": 4, "group": 32}


def test_the_nearest_exponent() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.26, -0.13, 0.0, 2.0**-6, 2.0**-9, -0.74]])
    codes, scales = shift_codes(weight, 8)
    assert scales.tolist() == [[1.0]]
    assert shift_values(codes).tolist() == [[1.0, -0.5, 0.25, -0.125, 0.0, 2.0**-6, 0.0, -1.0]]
    exact, steps = shift_codes(torch.tensor([[4.0, -2.0, 0.5, 0.0]]), 4)
    assert (shift_values(exact) * steps).tolist() == [[4.0, -2.0, 0.5, 0.0]]
    zeros, ones = shift_codes(torch.zeros(2, 16), 16)
    assert not shift_values(zeros).any() and ones.tolist() == [[1.0], [1.0]]
