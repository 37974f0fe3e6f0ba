"""Linears: packed weights of few bits, 8-bit integers, float8, 2:4."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
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
from fxopt.ir.graph import Graph, tensor_value
from fxopt.ir.ops.linear_24 import expand_24, linear_24
from fxopt.ir.ops.linear_fp8 import linear_fp8
from fxopt.ir.ops.linear_nbits import dequantized, linear_nbits
from fxopt.ir.ops.linear_shift import BITS, linear_shift, shift_values
from fxopt.ir.ops.linear_sparse import dense, linear_sparse
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.packing import pack, unpack

_LINEAR = torch.ops.aten.linear.default
_FP8 = 89
_TWO_OF_FOUR = "2:4"
_CUBLAS = "aten.linear on the weight in 16-bit floats, which takes more memory"


def element_of(x: object) -> torch.dtype | None:
    """The type in which weights are multiplied: 16-bit floats; float32 is computed as two bfloat16 terms."""
    value = tensor_value(x)
    if value is None:
        return None
    return value.dtype if value.dtype in ELEMENTS else torch.bfloat16 if value.dtype == torch.float32 else None


@dataclass(frozen=True)
class Coded:
    """The operands of a `linear_nbits` or `linear_shift` with a constant weight."""

    x: Any
    codes: Tensor  # uint8 [out, in]
    scales: Tensor
    zeros: Tensor | None
    bias: Any
    columns: int
    bits: int
    group: int
    activation_bits: int
    is_shift: bool

    @property
    def refusal(self) -> str:
        """Why there is no kernel; "" when there is one."""
        if self.activation_bits != 16:
            return f"activations are rounded to {self.activation_bits} bits; the kernels take them as they are"
        if element_of(self.x) is None:
            return "the activations are no 16- or 32-bit floats"
        return formats.refusal(self.bits, self.group, self.columns)

    def packed(self) -> Packed:
        """The weight as kernels want it."""
        element = element_of(self.x)
        assert element is not None and not self.refusal
        if self.is_shift:
            return formats.pack_shifts(self.codes, self.scales, self.group, element)
        return formats.pack_integers(self.codes, self.scales, self.zeros, self.bits, self.group, element)

    def dense(self) -> Tensor:
        """The weight in float32, [out, in]."""
        if self.is_shift:
            return shift_values(self.codes) * self.scales.repeat_interleave(self.group, 1)[:, : self.columns]
        return dequantized(pack(self.codes, self.bits), self.scales, self.zeros, self.bits, self.group, self.columns)


def coded(graph: Graph, node: fx.Node) -> Coded | None:
    """The operands of a node; None when its weight is no constant."""
    is_shift = node.target is linear_shift.target
    given: Any = node.args
    x, packed, scales, *rest = given
    zeros, bias, columns, bits, group, rounded = (None, *rest[:2], BITS, rest[2], 16) if is_shift else rest
    stored, steps, middle = (graph.constant(value) for value in (packed, scales, zeros))
    if stored is None or steps is None or (zeros is not None and middle is None):
        return None
    return Coded(x, unpack(stored, bits, columns), steps, middle, bias, columns, bits, group, rounded, is_shift)


def packed_arguments(job: Job, node: fx.Node, packed: Packed) -> tuple[Any, ...]:
    """The packed weight as constants of the graph, in the order of the operators."""
    offsets = None if packed.offsets is None else job.constant(packed.offsets, node, "offsets")
    return (
        job.constant(packed.words, node, "words"), job.constant(packed.scales, node, "scales"), offsets,
        job.constant(packed.factors, node, "factors"),
    )  # fmt: skip


def nbits(job: Job, node: fx.Node) -> None:
    """`linear_nbits`, `linear_shift`."""
    found = coded(job.graph, node)
    if found is None:
        job.refused(node, "its weight is no constant", "the reference")
        return
    if found.refusal:
        _in_cublas(job, node, found, found.refusal)
        return
    packed, behind = found.packed(), following(node)
    arguments = (
        found.x, *packed_arguments(job, node, packed), found.bias, behind.other, str(packed.layout), packed.outputs,
        packed.columns, packed.group, behind.activation, behind.combine,
    )  # fmt: skip
    reason = job.uncompilable(linear_packed, arguments, rows=0)
    if reason:
        _in_cublas(job, node, found, reason)
        return
    sizes = f"{packed.outputs} x {packed.columns}, {rows_of(found.x)} rows"
    job.kernel(node, f"{packed.layout} of {sizes}{_and(behind)}")
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


def _in_cublas(job: Job, node: fx.Node, found: Coded, reason: str) -> None:
    """The weight as floats, made now; activations that are rounded need the reference."""
    value = tensor_value(found.x)
    if value is None or found.activation_bits != 16:
        job.refused(node, reason, "the reference")
        return
    job.refused(node, reason, _CUBLAS)
    weight = job.constant(found.dense().to(value.dtype), node, "weight")
    job.substitute(node, job.call(_LINEAR, (found.x, weight, found.bias), node))


def int8(job: Job, node: fx.Node) -> None:
    """`linear_w8a8`, `linear_w8a8_dynamic`."""
    operands: Any = node.args
    x, codes, scales, bias, *given = operands
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
    """`linear_24`, `linear_sparse`."""
    given: Any = node.args
    x, values, where, bias = given[:4]
    pattern = given[5] if node.target is linear_sparse.target else _TWO_OF_FOUR
    kept, places, value = job.graph.constant(values), job.graph.constant(where), tensor_value(x)
    if kept is None or places is None or value is None:
        job.refused(node, "its weight is no constant", "the reference")
        return
    whole = expand_24(kept, places) if node.target is linear_24.target else dense(kept, places, given[4])
    weight = whole.to(value.dtype)
    outputs, columns = weight.shape
    reason = sparse.refusal(outputs, columns, value.dtype)
    if pattern != _TWO_OF_FOUR:
        reason = f"GPUs skip zeros of the pattern {_TWO_OF_FOUR}; these are {pattern}"
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
    linear_sparse.target: sparse_24,
}
