"""The 8-bit products of CUDA devices give what the definitions give: the same functions on CPU tensors, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.backends import eager_cuda
from fxopt.catalog import entries
from fxopt.ir.op import all_ops

KERNELS: dict[str, Callable[..., Tensor]] = {
    "linear_w8a8": eager_cuda.linear_w8a8,
    "linear_w8a8_dynamic": eager_cuda.linear_w8a8_dynamic,
    "linear_fp8": eager_cuda.linear_fp8,
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def cases(name: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """The operator's own samples, and rows enough for every product."""
    for x, codes, *rest in all_ops()[name].sample_arguments():
        yield x.to(dtype), codes, *rest
        if x.dim() == 2:
            yield x.repeat(20, 1).to(dtype), codes, *rest


def close(result: Tensor, expected: Tensor) -> None:
    """Within roundings of the element type, of the largest value of the result."""
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    room = 4 * torch.finfo(expected.dtype).eps * (expected.float().abs().amax() if expected.numel() else 0.0)
    assert bool(((result.float() - expected.float()).abs() <= room).all())


@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w8a8_dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_are_exact(name: str, dtype: torch.dtype) -> None:
    for arguments in cases(name, dtype):
        result, expected = KERNELS[name](*arguments), all_ops()[name].function(*arguments)
        assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_sums_that_do_not_fit_32_bits_are_not_wrapped() -> None:
    inner = 70_000
    x, codes = torch.full((1, inner), 255.0), torch.full((8, inner), 127, dtype=torch.int8)
    operands = x, codes, torch.ones(8), None, 1.0, 0
    result = eager_cuda.linear_w8a8(*operands)
    assert result[0].tolist() == [float(torch.tensor(255.0 * 127 * inner))] * 8
    assert 255 * 127 * inner > 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float8_products(dtype: torch.dtype) -> None:
    for arguments in cases("linear_fp8", dtype):
        close(KERNELS["linear_fp8"](*arguments), all_ops()["linear_fp8"].function(*arguments))


def test_it_is_no_backend() -> None:
    assert "eager-cuda" not in entries("backend") and "eager" in entries("backend")


@needs_gpu
@pytest.mark.parametrize("name", list(KERNELS))
def test_cuda_tensors_go_to_the_products(name: str) -> None:
    eager_cuda.register()
    for arguments in cases(name):
        there = [value.cuda() if isinstance(value, Tensor) else value for value in arguments]
        close(all_ops()[name](*there).cpu(), all_ops()[name].function(*arguments))
