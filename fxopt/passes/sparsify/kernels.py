"""Which zeros the kernels of the target skip, and in which element type."""

from __future__ import annotations

from torch import Tensor

from fxopt.ir.ledger import Refusal
from fxopt.ir.sparsity import UNSTRUCTURED, Pattern
from fxopt.passes.base import Context
from fxopt.passes.sparsify.layer import Layer

AUTO = "auto"
_QUANTISES = "quantize-linear"


def patterns_for(ctx: Context, layer: Layer, weight: Tensor) -> list[Pattern] | Refusal:
    """The patterns that pay for a weight [out, in]; why there is none."""
    kind = "conv" if layer.is_conv else "linear"
    known = dict.fromkeys(each.pattern for each in ctx.target.sparse_kernels if each.fits(kind) and each.offered)
    found = [text for text in known if not isinstance(skipped_in(ctx, weight, text), Refusal)]
    if not found and ctx.objective != "latency":
        found = [UNSTRUCTURED]  # the smallest error for the bytes
    if found:
        return _finest([Pattern.parse(text) for text in found])
    why = skipped_in(ctx, weight, next(iter(known), UNSTRUCTURED))
    assert isinstance(why, Refusal)
    return why


def _finest(patterns: list[Pattern]) -> list[Pattern]:
    """Without blocks that are made of several smaller ones which are there too: these have the smaller error."""
    blocks = [each.outputs for each in patterns if not each.is_counted]
    return [
        each
        for each in patterns
        if each.is_counted or not any(each.outputs > size and each.outputs % size == 0 for size in blocks)
    ]


def skipped_in(ctx: Context, weight: Tensor, pattern: str) -> str | Refusal:
    """The element type in which a kernel skips such zeros of a weight [out, in]: its own, or 8 bits later on."""
    dtype, shape = str(weight.dtype).removeprefix("torch."), (weight.shape[0], weight.shape[1])
    why = ctx.unskipped(dtype, pattern, shape)
    if not why:
        return dtype
    if dtype == "float32" and _QUANTISES in ctx.later and not ctx.unskipped("int8", pattern, shape):
        return "int8"
    return Refusal("{}{}", why, _hint(ctx))


def _hint(ctx: Context) -> str:
    """What would be skipped, and what to do for it."""
    own = dict.fromkeys(kernel.pattern for kernel in ctx.target.sparse_kernels if kernel.custom_ops)
    if not own:
        return '; objective="size" stores zeros in fewer bytes'
    lacking = [
        text
        for text, given in (("custom_ops", ctx.custom_ops), (f"the pass {_QUANTISES}", _QUANTISES in ctx.later))
        if not given
    ]
    needs = f" (needs {' and '.join(lacking)})" if lacking else ""
    return f'; own 8-bit kernels skip {", ".join(own)}{needs}, objective="size" stores zeros in fewer bytes'


def too_few_rows(ctx: Context, layer: Layer, pattern: str, dtype: str) -> Refusal | None:
    """Why the kernel is not known to be faster for so few rows, or is none of convolutions."""
    rows, kind = layer.positions(), "conv" if layer.is_conv else "linear"
    kernels = [
        each
        for each in ctx.target.sparse_kernels
        if (each.pattern, each.dtype) == (pattern, dtype) and each.fits(kind)
    ]
    if layer.is_conv and any(kernel.custom_ops for kernel in kernels):
        return Refusal("own kernels skip zeros of linears, not of convolutions")
    if not kernels or ctx.target.sparse_kernel(pattern, dtype, rows, kind) is not None:
        return None
    first = min(kernels, key=lambda kernel: kernel.least_rows)
    return Refusal(
        "too few rows at a time, {}: {} is known to be faster from {} on ({})",
        rows, pattern, first.least_rows, first.source,
    )  # fmt: skip
