"""Operations of matrix products, convolutions and attention from shapes: 2 per multiply-add."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Shape = Sequence[int]
_SIGNED, _UNSIGNED = torch.int8, torch.uint8


def matmul(a: Shape, b: Shape) -> float:
    """a [..., M, K] @ b [..., K, N], batch dimensions broadcast; vectors as in numpy."""
    if not a or not b:
        return 0.0
    rows = a[-2] if len(a) > 1 else 1
    columns = b[-1] if len(b) > 1 else 1
    first, second = list(a[:-2]), list(b[:-2])
    longest = max(len(first), len(second))
    padded = zip([1] * (longest - len(first)) + first, [1] * (longest - len(second)) + second, strict=True)
    batch = math.prod(n if m == 1 else m for m, n in padded)
    return 2.0 * batch * rows * a[-1] * columns


def convolution(output: Shape, weight: Shape) -> float:
    """Every output element sums C / groups * kernel products; weight [out, C / groups, *kernel]."""
    return 2.0 * math.prod(output) * math.prod(weight[1:])


def transposed_convolution(x: Shape, weight: Shape) -> float:
    """Every input element is multiplied with out / groups * kernel weights; weight [C, out / groups, *kernel]."""
    return 2.0 * math.prod(x) * math.prod(weight[1:])


def attention(batch: int, heads: int, queries: int, keys: int, depth: int, value_depth: int) -> float:
    """Scores and weighted values, without the softmax; masked positions are computed too."""
    return 2.0 * batch * heads * queries * keys * (depth + value_depth)


def einsum(equation: str, shapes: Sequence[Shape]) -> float:
    """2 operations per point of the index space; ellipses count by the largest operand's extra axes."""
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    extent: dict[str, int] = {}
    extra = 1
    for labels, shape in zip(operands, shapes, strict=False):
        before, dots, after = labels.partition("...")
        inner = len(shape) - len(before) - len(after)
        axes = (*shape[: len(before)], *shape[len(shape) - len(after) :])
        for name, size in zip(before + after, axes, strict=False):
            extent[name] = max(extent.get(name, 1), size)
        if dots and inner > 0:
            extra = max(extra, math.prod(shape[len(before) : len(before) + inner]))
    return 2.0 * extra * math.prod(extent.values())


def integer_dtype(a: torch.Tensor | None, b: torch.Tensor | None) -> str:
    """The rate of an 8-bit product: "int8" is uint8 x int8, the form that passes emit.

    "uint8" is uint8 x uint8 and "s8s8" int8 x int8, both of which are slower in ONNX Runtime on x86.
    """
    if a is None or b is None or (a.dtype == _UNSIGNED and b.dtype == _SIGNED):
        return "int8"
    return "uint8" if a.dtype == b.dtype == _UNSIGNED else "s8s8"
