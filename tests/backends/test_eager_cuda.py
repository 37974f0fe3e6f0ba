"""The products of CUDA devices give what the definitions give: the same functions on CPU tensors, and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.backends import eager_cuda
from fxopt.catalog import entries
from fxopt.cost_model.targets import get_target
from fxopt.ir.op import all_ops
from fxopt.ir.ops.linear_sparse import linear_sparse, stored
from fxopt.ir.sparsity import Pattern

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


def sparse_case(dtype: torch.dtype, out: int = 64, columns: int = 128, text: str = "2:4") -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    pattern, weight = Pattern.parse(text), torch.randn(out, columns, generator=generator)
    values, mask = stored((weight * pattern.mask(weight.square(), 0.5)).to(dtype), pattern)
    x = torch.randn(3, 5, columns, generator=generator).to(dtype)
    return x, values, mask, torch.randn(out, generator=generator).to(dtype), columns, text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_weights_are_converted_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's conversion needs a GPU; what it is given has the pattern, and its product is used."""
    given: list[Tensor] = []

    def converted(weight: Tensor) -> Tensor:
        given.append(weight)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", converted)
    arguments = sparse_case(dtype)
    results = [eager_cuda.linear_sparse(*arguments) for _ in range(2)]
    (weight,) = given
    assert weight.dtype == dtype and weight.is_contiguous() and Pattern.parse("2:4").violation(weight) == ""
    for result in results:
        close(result, linear_sparse.function(*arguments))


@pytest.mark.parametrize(
    "case", [sparse_case(torch.float32), sparse_case(torch.float16, 40), sparse_case(torch.float16, 64, 96),
             sparse_case(torch.float16, text="4x1")],
)  # fmt: skip
def test_what_has_no_semi_structured_product_runs_the_definition(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: pytest.fail("was converted"))
    assert torch.equal(eager_cuda.linear_sparse(*case), linear_sparse.function(*case))


def test_which_zeros_give_time_on_a_gpu() -> None:
    a100, older = get_target("a100"), dataclasses.replace(get_target("a100"), name="t4", features=frozenset({"mma"}))
    assert eager_cuda.unskipped(a100, "float16", "2:4", (64, 128)) == ""
    for target, dtype, pattern, shape, text in (
        (a100, "float16", "4:8", None, "the matrix units of CUDA devices skip 2:4, not 4:8"),
        (a100, "float32", "2:4", None, "2:4 products take float16 and bfloat16; the weight is float32"),
        (a100, "bfloat16", "2:4", (64, 96), "inputs in multiples of 64; the weight is 64x96"),
        (older, "float16", "2:4", None, "t4 does not skip 2:4: that begins with compute capability 8.0"),
    ):
        assert text in eager_cuda.unskipped(target, dtype, pattern, shape)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_tensors_go_to_the_sparse_product(dtype: torch.dtype) -> None:
    eager_cuda.register()
    arguments = sparse_case(dtype)
    there = [value.cuda() if isinstance(value, Tensor) else value for value in arguments]
    close(linear_sparse(*there).cpu(), linear_sparse.function(*arguments))
