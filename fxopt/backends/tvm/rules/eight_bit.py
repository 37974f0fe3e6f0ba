"""Operators of fxopt whose values lie on 8-bit levels: convolutions and what stands between them, tables of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.tvm.codes import Coded, Levels
from fxopt.backends.tvm.kernels.bsr import pack_bsr
from fxopt.backends.tvm.kernels.bsr_int8 import Blocks, block_density, pack_blocks
from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.conv_bsr_int8 import conv_bsr_int8, is_possible, packed_words, patch_space
from fxopt.backends.tvm.kernels.conv_int8 import conv_int8, pack_conv_codes, pack_per_output, work_spaces
from fxopt.backends.tvm.kernels.depthwise import depthwise, depthwise_scratch
from fxopt.backends.tvm.kernels.dot import Dot, dot_for, preferred
from fxopt.backends.tvm.kernels.gather import gather
from fxopt.backends.tvm.kernels.pointwise import Tree
from fxopt.backends.tvm.kernels.pool import pool
from fxopt.backends.tvm.kernels.reduce import reduce
from fxopt.backends.tvm.lowering import Call, Lowering, Rule
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.rules.integers import constants, numbers
from fxopt.backends.tvm.rules.spatial import convolved
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported

# Density of blocks below which products in floats that skip the others beat all products of codes: these run at 1.8
# times (pairs of codes) or 4 times (groups of four) the rate of floats (benchmarks/wasm.py, benchmarks/tvm_kernels.py).
_EMPTY_ENOUGH = {2: 0.4, 4: 0.18}
# Density below which a product of the blocks of codes that are kept is faster (benchmarks/sparse_rates.py).
_WORTHWHILE = {"sdot": 0.6, "smull": 0.6, "relaxed_dot": 0.25, "dot_i16x8": 0.6}
_MOST_TAPS = 500  # of a depthwise window: 500 * 255 * 127 < 2**24


def _is_sparse(matrix: Any, width: int, dot: Dot) -> bool:
    """Whether skipping the blocks of zeros, in floats, is faster than the machine's products of all codes."""
    packed = pack_bsr(matrix.astype(np.float32), width)
    return bool(len(packed.values)) and packed.density < _EMPTY_ENOUGH[dot.group]


def _blocks(matrix: Any, size: Conv, dot: Dot, machine: Machine) -> Blocks | None:
    """The weight's blocks, where a product of them alone is faster."""
    if not is_possible(size, machine):
        return None
    density = block_density(matrix, machine.outputs)
    return pack_blocks(matrix, machine.outputs, dot) if 0 < density < _WORTHWHILE[dot.instruction] else None


def levels_of(low: Lowering, call: Call, name: str) -> Levels:
    """The levels that the arguments NAME_scale and NAME_zero give, stored as the machine likes it."""
    scale, zero = low.number(call[f"{name}_scale"]), low.number(call[f"{name}_zero"])
    return Levels(float(scale), int(zero), preferred(low.program.machine).x)


def conv_w8a8(low: Lowering, call: Call) -> Coded:
    """Codes to codes."""
    codes, scales, bias = constants(low, call)
    rank = codes.dim() - 2
    if rank not in (1, 2):
        raise Unsupported(f"convolves {rank} axes; the kernels take 1 or 2")
    x, y = levels_of(low, call, "x"), levels_of(low, call, "y")
    shape, pads = low.shape(call["x"]), call["pads"]
    begins, ends = pads[:rank], pads[rank:]
    size = Conv(
        batch=shape[0],
        channels=shape[1],
        height=1 if rank == 1 else shape[2],
        width=shape[-1],
        outputs=codes.shape[0],
        kernel=_two(codes.shape[2:], 1),
        stride=_two(call["stride"], 1),
        pads=(*_two(begins, 0), *_two(ends, 0)),
        dilation=_two(call["dilation"], 1),
        groups=int(call["groups"]),
    )
    made = low.program.value(low.shape(call.node), y.stored.dtype)
    if made.count:
        kernel = _depthwise if size.groups == size.channels > 1 and size.inner <= _MOST_TAPS else _general
        kernel(low, call["x"], size, (x, y), codes, scales, bias, made)
    return Coded(made, y)


def _two(values: Sequence[Any], first: int) -> tuple[int, int]:
    """Of rows and columns; one axis is that of columns."""
    rows, columns = (first, *values) if len(values) == 1 else values
    return int(rows), int(columns)


def _general(
    low: Lowering, source: fx.Node, size: Conv, levels: tuple[Levels, Levels], codes: torch.Tensor,
    scales: torch.Tensor, bias: torch.Tensor | None, made: Value,
) -> None:  # fmt: skip
    program, machine = low.program, low.program.machine
    matrix = codes.reshape(codes.shape[0], -1).numpy()
    dot = dot_for(machine, matrix)
    x, y = replace(levels[0], stored=dot.x), levels[1]
    results = [(_whole_bias(scales, x, bias) + (x.shift - x.zero) * matrix.astype(np.int64).sum(1)).astype(np.int32)]
    results.append(_requantising(scales, x, y))
    slots = [program.constant(pack_per_output(values, size.groups, machine.outputs)) for values in results]
    blocks = _blocks(matrix, size, dot, machine)
    if blocks is not None:
        given = (packed_words(blocks, dot), blocks.inputs, blocks.firsts)
        count = patch_space(size, dot, machine)
        slots = [*(program.constant(item) for item in given), *slots]
        slots += [program.slot(count, dot.x.dtype)] if count else []
        sizes = (size, blocks.groups, x, y, dot)
        program.call(conv_bsr_int8, sizes, low.codes(source, x).slot, *slots, made.slot)
        return
    if size.groups == 1 and _is_sparse(matrix, machine.outputs, dot):
        units = torch.from_numpy(_requantising(scales, x, y))  # the levels of y, as whole numbers
        weight = codes.float() * units.reshape(-1, *(1 for _ in codes.shape[1:]))
        floats = low.program.value(made.shape)
        shift = _whole_bias(scales, x, bias).astype(np.float32) * units.numpy()
        convolved(low, size, numbers(low, source, x), weight, shift, floats)
        low.emit(("encode", ("load", 0), replace(y, scale=1.0)), (floats,), made)
        return
    slots.insert(0, program.constant(pack_conv_codes(codes.numpy(), size.groups, machine.outputs, dot)))
    slots += [program.slot(count, kind) for kind, count in work_spaces(size, dot, machine)]
    program.call(conv_int8, (size, x, y, dot), low.codes(source, x).slot, *slots, made.slot)


def _depthwise(
    low: Lowering, source: fx.Node, size: Conv, levels: tuple[Levels, Levels], codes: torch.Tensor,
    scales: torch.Tensor, bias: torch.Tensor | None, made: Value,
) -> None:  # fmt: skip
    program, (x, y) = low.program, levels
    given = [codes.numpy(), _whole_bias(scales, x, bias), _requantising(scales, x, y)]
    slots = [program.constant(item.astype(np.float32)) for item in given]
    scratch = program.slot(depthwise_scratch(size))
    program.call(depthwise, (size,), low.codes(source, x).slot, *slots, scratch, made.slot, levels=levels)


def _whole_bias(scales: torch.Tensor, x: Levels, bias: torch.Tensor | None) -> Any:
    """The bias in units of the products, int64 [out]."""
    if bias is None:
        return np.zeros(len(scales), np.int64)
    return torch.round(bias.double() / (scales.double() * x.scale)).numpy().astype(np.int64)


def _requantising(scales: torch.Tensor, x: Levels, y: Levels) -> Any:
    """Steps of y in a unit of the products, float32 [out]."""
    return (scales.double() * x.scale / y.scale).numpy().astype(np.float32)


# ---- what stands between convolutions


def decoded(low: Lowering, argument: fx.Node, levels: Levels, number: int) -> tuple[Tree, Value]:
    """The value on levels, as an expression over operand `number`, which holds its codes."""
    return ("decode", ("load", number), levels), low.codes(argument, levels)


def _elementwise(operator: str) -> Rule:
    def rule(low: Lowering, call: Call) -> Coded:
        x, other, y = (levels_of(low, call, name) for name in ("x", "other", "y"))
        first, a = decoded(low, call["x"], x, 0)
        second, b = decoded(low, call["other"], other, 1)
        return encoded(low, call, (operator, first, second), (a, b), y)

    return rule


def encoded(low: Lowering, call: Call, tree: Tree, operands: tuple[Value, ...], levels: Levels) -> Coded:
    """The value of an expression on levels."""
    made = low.program.value(low.shape(call.node), levels.stored.dtype)
    low.emit(("encode", tree, levels), operands, made)
    return Coded(made, levels)


def concat_a8(low: Lowering, call: Call) -> Coded:
    """Each part is rounded to the levels of the result as it is copied."""
    y = levels_of(low, call, "y")
    made = low.program.value(low.shape(call.node), y.stored.dtype)
    axis, start = call["axis"] % len(made.shape), 0
    for part, scale, zero in zip(call["xs"], call["scales"], call["zeros"], strict=True):
        tree, codes = decoded(low, part, replace(y, scale=float(scale), zero=int(zero)), 0)
        place = made.viewed(codes.shape, made.strides, start * made.strides[axis])
        low.emit(("encode", tree, y), (codes,), place)
        start += codes.shape[axis]
    return Coded(made, y)


def _pooled(low: Lowering, call: Call, pools: Callable[[Value], Value]) -> Coded:
    """Means of whole numbers, then the levels of the result."""
    x, y = levels_of(low, call, "x"), levels_of(low, call, "y")
    mean = pools(numbers(low, call["x"], x))
    return encoded(low, call, ("mul", ("load", 0), ("constant", x.scale, "float32")), (mean,), y)


def global_average_pool_a8(low: Lowering, call: Call) -> Coded:
    """Of each plane."""

    def pools(found: Value) -> Value:
        shape = low.shape(call.node)
        made = low.program.value(shape)
        if made.count:
            sizes = ("mean", math.prod(found.shape[:2]), math.prod(found.shape[2:]), 1)
            low.program.call(reduce, sizes, found.slot, made.slot)
        return made

    return _pooled(low, call, pools)


def average_pool_a8(low: Lowering, call: Call) -> Coded:
    """Of windows."""

    def pools(found: Value) -> Value:
        batch, channels, height, width = found.shape
        top, left, bottom, right = call["pads"]
        kernel, stride = _two(call["kernel"], 1), _two(call["stride"], 1)
        size = Conv(
            batch, channels, height, width, channels, kernel, stride, (top, left, bottom, right), groups=channels
        )
        made = low.program.value(low.shape(call.node))
        if made.count:
            low.program.call(pool, (size, True, bool(call["include_pad"])), found.slot, made.slot)
        return made

    return _pooled(low, call, pools)


def embedding_w8(low: Lowering, call: Call) -> Value:
    """Rows of codes by index, times the scale of the row."""
    codes, scales = low.constant(call["codes"]), low.weight(call["scales"], "scales")
    if codes is None or codes.dtype != torch.int8:
        raise Unsupported("its codes are not int8 constants")
    indices = low.dense(call["indices"])
    if indices.dtype not in ("int64", "int32"):
        raise Unsupported(f"takes indices of integers, not {indices.dtype}")
    shape, (rows, width) = indices.shape, codes.shape
    wrapped = low.program.value(shape, indices.dtype)
    zero, end = ("constant", 0, indices.dtype), ("constant", rows, indices.dtype)
    index = ("load", 0)
    low.emit(("where", ("lt", index, zero), ("add", index, end), index), (indices,), wrapped)
    made = low.program.value((*shape, width))
    if not made.count:
        return made
    taken, units = low.program.value((*shape, width), "int8"), low.program.value((*shape, 1))
    for table, found, kind, size in ((codes, taken, "int8", width), (scales, units, "float32", 1)):
        slot = low.program.constant(table.contiguous().numpy())
        sizes = (wrapped.count, rows, size, indices.dtype)
        low.program.call(gather, sizes, slot, wrapped.slot, found.slot, kind=kind)
    low.emit(("mul", ("cast", ("load", 0), "int8", "float32"), ("load", 1)), (taken, units), made)
    return made


RULES: dict[str, Rule] = {
    "conv_w8a8": conv_w8a8,
    "add_a8": _elementwise("add"),
    "mul_a8": _elementwise("mul"),
    "concat_a8": concat_a8,
    "global_average_pool_a8": global_average_pool_a8,
    "average_pool_a8": average_pool_a8,
    "embedding_w8": embedding_w8,
}
