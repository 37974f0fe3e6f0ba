"""Linears: packed weights of few bits, 8-bit integers, float8, 2:4."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.backends.triton import formats
from fxopt.backends.triton.configs import ELEMENTS
from fxopt.backends.triton.formats import Packed
from fxopt.backends.triton.lower.epilogues import Following, following
from fxopt.backends.triton.lower.job import Job, rows_of
from fxopt.backends.triton.ops import linear_sparse24 as sparse
from fxopt.backends.triton.ops.linear_int8 import COPIED, LONGEST, linear_int8
from fxopt.backends.triton.ops.linear_packed import linear_packed
from fxopt.backends.triton.ops.tensor_range import tensor_range
from fxopt.backends.triton.worth import sparse_24_refusal
from fxopt.ir.graph import tensor_value
from fxopt.ir.ops.linear_24 import expand_24, linear_24
from fxopt.ir.ops.linear_fp8 import linear_fp8
from fxopt.ir.ops.linear_nbits import dequantized, linear_nbits
from fxopt.ir.ops.linear_shift import BITS, linear_shift, shift_values
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.packing import unpack

_LINEAR = torch.ops.aten.linear.default
_FP8 = 89
_CUBLAS = "aten.linear on the weight in 16-bit floats, which takes more memory"


def element_of(x: object) -> torch.dtype | None:
    """The type in which weights are multiplied: 16-bit floats; float32 is computed as two bfloat16 terms."""
    value = tensor_value(x)
    if value is None:
        return None
    return value.dtype if value.dtype in ELEMENTS else torch.bfloat16 if value.dtype == torch.float32 else None


def pack_nbits(job: Job, node: fx.Node) -> Packed | str:
    """The packed weight of a `linear_nbits` or `linear_shift`, or why it has no kernel."""
    is_shift = node.target is linear_shift.target
    x, packed, scales, *rest = node.args
    zeros, _, columns, bits, group, activation_bits = (None, *rest[:2], BITS, rest[2], 16) if is_shift else rest
    stored, steps, middle = (job.graph.constant(value) for value in (packed, scales, zeros))
    element = element_of(x)
    if activation_bits != 16:
        return f"activations are rounded to {activation_bits} bits; the kernels take them as they are"
    if element is None:
        return "the activations are no 16- or 32-bit floats"
    if stored is None or steps is None or (zeros is not None and middle is None):
        return "its weight is no constant"
    reason = formats.refusal(int(bits), int(group), int(columns))
    if reason:
        return reason
    codes = unpack(stored, int(bits), int(columns))
    if is_shift:
        return formats.pack_shifts(codes, steps, int(group), element)
    return formats.pack_integers(codes, steps, middle, int(bits), int(group), element)


def packed_arguments(job: Job, node: fx.Node, packed: Packed) -> tuple[Any, ...]:
    """The packed weight as constants of the graph, in the order of the operators."""
    offsets = None if packed.offsets is None else job.constant(packed.offsets, node, "offsets")
    return (
        job.constant(packed.words, node, "words"), job.constant(packed.scales, node, "scales"), offsets,
        job.constant(packed.factors, node, "factors"),
    )  # fmt: skip


def nbits(job: Job, node: fx.Node) -> None:
    """`linear_nbits`, `linear_shift`."""
    is_shift = node.target is linear_shift.target
    found = pack_nbits(job, node)
    if isinstance(found, str):
        if "rounded" in found or element_of(node.args[0]) is None:
            job.refused(node, found, "the reference")
        else:
            _in_cublas(job, node, found)
        return
    bias = node.args[3 if is_shift else 4]
    behind = following(node)
    tail = behind.activation, behind.combine
    arguments = (
        node.args[0], *packed_arguments(job, node, found), bias, behind.other, str(found.layout), found.outputs,
        found.columns, found.group, *tail,
    )  # fmt: skip
    reason = job.uncompilable(linear_packed, arguments, rows=0)
    if reason:
        _in_cublas(job, node, reason)
        return
    rows = rows_of(node.args[0])
    job.kernel(node, f"{found.layout} of {found.outputs} x {found.columns}, {rows} rows{_and(behind)}")
    _finish(job, linear_packed.target, arguments, node, behind)


def _and(behind: Following) -> str:
    names = " and ".join(name for name in (behind.activation, behind.combine) if name)
    return f", with {names}" if names else ""


def _finish(job: Job, target: Any, arguments: tuple[Any, ...], node: fx.Node, behind: Following) -> None:
    """Put the kernel where the last of the nodes that it takes over is, and remove the others."""
    made = job.call(target, arguments, behind.last)
    between = [] if behind.last is node else [node]
    if behind.combine and behind.activation:
        between.insert(0, next(iter(node.users)))
    job.substitute(behind.last, made)
    for old in between:
        job.graph.erase(old)


def _in_cublas(job: Job, node: fx.Node, reason: str) -> None:
    """The weight as floats, made now."""
    is_shift = node.target is linear_shift.target
    x, packed, scales, *rest = node.args
    zeros, bias, columns, bits, group = (None, *rest[:2], BITS, rest[2]) if is_shift else rest[:5]
    stored, steps, middle = (job.graph.constant(value) for value in (packed, scales, zeros))
    value = tensor_value(x)
    if stored is None or steps is None or value is None or (zeros is not None and middle is None):
        job.refused(node, reason, "the reference")
        return
    if is_shift:
        weight = shift_values(unpack(stored, BITS, int(columns)))
        weight = weight * steps.repeat_interleave(int(group), 1)[:, : int(columns)]
    else:
        weight = dequantized(stored, steps, middle, int(bits), int(group), int(columns))
    job.refused(node, reason, _CUBLAS)
    made = job.call(_LINEAR, (x, job.constant(weight.to(value.dtype), node, "weight"), bias), node)
    job.substitute(node, made)


def int8(job: Job, node: fx.Node) -> None:
    """`linear_w8a8`, `linear_w8a8_dynamic`."""
    x, codes, scales, bias, *given = node.args
    weight, value = job.graph.constant(codes), tensor_value(x)
    if weight is None or value is None or value.dtype not in (*ELEMENTS, torch.float32):
        job.refused(node, "its weight is no constant, or its input no float", "the reference")
        return
    if weight.shape[1] > LONGEST:
        job.refused(node, f"sums over {weight.shape[1]} inputs may exceed 32 bits", "the reference")
        return
    if given:
        scale: Any = job.constant(torch.tensor(float(given[0])), node, "step")
        zero: Any = job.constant(torch.tensor(float(given[1])), node, "zero")
    else:
        found = job.call(tensor_range.target, (x,), node)
        scale, zero = (job.call(operator.getitem, (found, index), node) for index in range(2))
        for part in (scale, zero):
            part.meta["val"] = torch.empty((), device="meta")
    behind = following(node)
    filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % COPIED))
    codes = job.constant(filled, node, "codes")
    sums = job.constant(weight.sum(1, dtype=torch.int32), node, "sums")
    arguments = (x, codes, scales, sums, bias, behind.other, scale, zero, behind.activation, behind.combine)
    reason = job.uncompilable(linear_int8, arguments, rows=0) or job.uncompilable(tensor_range, (x,))
    if reason:
        job.refused(node, reason, "torch._int_mm")
        return
    outputs, columns = weight.shape
    job.kernel(node, f"int8 of {outputs} x {columns}, {rows_of(x)} rows{_and(behind)}")
    _finish(job, linear_int8.target, arguments, node, behind)


def float8(job: Job, node: fx.Node) -> None:
    """`linear_fp8`: torch has the product."""
    if job.kernels.chip.arch < _FP8:
        job.refused(node, f"{job.kernels.chip.sm} has no fp8", "the reference")
    else:
        job.kernel(node, "torch._scaled_mm")


def sparse_24(job: Job, node: fx.Node) -> None:
    """`linear_24`."""
    x, values, places, bias = node.args
    kept, where, value = job.graph.constant(values), job.graph.constant(places), tensor_value(x)
    if kept is None or where is None or value is None:
        job.refused(node, "its weight is no constant", "the reference")
        return
    weight = expand_24(kept, where).to(value.dtype)
    outputs, columns = weight.shape
    reason = sparse.refusal(outputs, columns, value.dtype)
    reason = reason or sparse_24_refusal(job.target, rows_of(x), outputs, columns, value.dtype)
    if reason:
        job.refused(node, reason, "aten.linear on the dense weight")
        made = job.call(_LINEAR, (x, job.constant(weight, node, "weight"), bias), node)
    else:
        job.kernel(node, f"2:4 of {outputs} x {columns}, in torch's sparse products")
        packed = (job.constant(part, node, name) for part, name in zip(sparse.packed(weight), ("kept", "meta")))
        made = job.call(sparse.linear_sparse24.target, (x, *packed, bias), node)
    job.substitute(node, made)


RULES: dict[Any, Callable[[Job, fx.Node], None]] = {
    linear_nbits.target: nbits,
    linear_shift.target: nbits,
    linear_w8a8.target: int8,
    linear_w8a8_dynamic.target: int8,
    linear_fp8.target: float8,
    linear_24.target: sparse_24,
}
__all__ = ["RULES", "Tensor", "element_of", "pack_nbits", "packed_arguments"]
