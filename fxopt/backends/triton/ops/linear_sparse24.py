"""Linear with a 2:4 sparse weight in the sparse tensor cores, through torch: CUTLASS, or cuSPARSELt from sm_90 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.sparse import _semi_structured_conversions
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.ops.registry import KernelOp, contiguous_rows

_OUTPUTS, _INPUTS, _ROWS = 32, 64, 8  # multiples that the products take
_CUSPARSELT = 90  # CUTLASS's kernels are for sm_80
_ATEN = torch.ops.aten
_CONVERSIONS: Any = _semi_structured_conversions
_COMPRESSED: Any = WeakTensorKeyDictionary()  # kept values -> the same for cuSPARSELt


def refusal(outputs: int, columns: int, element: torch.dtype) -> str:
    """Why a weight of this size has no such product; "" when it has."""
    if element not in (torch.float16, torch.bfloat16):
        return f"2:4 products take float16 and bfloat16; the operands are {element}"
    if outputs % _OUTPUTS or columns % _INPUTS:
        wanted = f"multiples of {_OUTPUTS} outputs and {_INPUTS} inputs"
        return f"2:4 products take {wanted}; the weight is {outputs} x {columns}"
    return ""


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and their places as CUTLASS has them, of a 2:4 sparse weight [out, in] on a CPU."""
    values, places = _CONVERSIONS.sparse_semi_structured_from_dense_cutlass(weight)
    return values, places


def _dense(values: Tensor, places: Tensor) -> Tensor:
    weight: Tensor = _CONVERSIONS.sparse_semi_structured_to_dense_cutlass(values, places)
    return weight


def _reference(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    weight = _dense(values, places)
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _kernels(*flat: Any) -> Tensor:
    """The same in torch's sparse products; rows are filled up to a multiple of 8."""
    x, values, places, bias = flat
    outputs, columns = values.shape[0], 2 * values.shape[1]
    rows = contiguous_rows(x, columns)
    count = len(rows)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % _ROWS))
    if chip_for(x).arch >= _CUSPARSELT and torch.backends.cusparselt.is_available():
        y = _ATEN._cslt_sparse_mm(_compressed(values, places), rows.t(), bias).t()
    else:
        y = _ATEN._sparse_semi_structured_linear(rows, values, places, bias=bias)
    result: Tensor = y[:count].reshape(*x.shape[:-1], outputs)
    return result


def _compressed(values: Tensor, places: Tensor) -> Tensor:
    if values not in _COMPRESSED:
        _COMPRESSED[values] = _ATEN._cslt_compress(_dense(values, places))
    found: Tensor = _COMPRESSED[values]
    return found


linear_sparse24 = KernelOp("linear_sparse24", _reference, _kernels)
