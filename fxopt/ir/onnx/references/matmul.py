"""Matrix products of real numbers: MatMul, Gemm, Einsum, Det."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import in_int64
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("MatMul")
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the broadcasting of numpy."""
    return in_int64(torch.matmul)(a, b)


@operators.reference("Gemm")
def gemm(
    call: Call,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    """alpha * a' @ b' + beta * c, with a' and b' optionally transposed."""
    left = a.t() if transA else a
    linear = bool(transB) and a.is_floating_point() and alpha == 1.0
    if linear and c is not None and c.dim() == 1 and beta == 1.0:
        return F.linear(left, b, c if c.shape[0] == b.shape[0] else c.expand(b.shape[0]))
    result = F.linear(left, b) if linear else in_int64(torch.matmul)(left, b.t() if transB else b)
    if alpha != 1.0:
        result = (result * alpha).to(a.dtype)
    if c is None:
        return result
    scaled = c if beta == 1.0 else (c * beta).to(a.dtype)
    return in_int64(torch.add)(result, scaled)


@operators.reference("Einsum")
def einsum(call: Call, *operands: Tensor, equation: str) -> Tensor:
    """The sum of products that the equation names."""
    result: Tensor = torch.einsum(str(equation).replace(" ", ""), *operands)
    return result


@operators.reference("Det")
def det(call: Call, x: Tensor) -> Tensor:
    """The determinant of the matrices in the last two axes."""
    result: Tensor = torch.linalg.det(x)
    return result
