"""Linear layers of fxopt with weights of few bits: products of 8-bit codes, or of floats with decoded weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.tvm.codes import Coded, Levels
from fxopt.backends.tvm.kernels.bsr_int8 import Blocks, bsr_int8, panel_rows, sparse_form
from fxopt.backends.tvm.kernels.dense import pack_bias
from fxopt.backends.tvm.kernels.dense_int8 import Product, dense_int8, work_space
from fxopt.backends.tvm.kernels.dot import Dot, column_sums, dot_for, in_groups, pack_codes, preferred
from fxopt.backends.tvm.kernels.panels import pack_bits
from fxopt.backends.tvm.kernels.quantize import find_range, quantize_to_range, round_groups
from fxopt.backends.tvm.lowering import Call, Lowering, Rule, operator_name
from fxopt.backends.tvm.rules.arrange import VIEWS
from fxopt.backends.tvm.rules.products import activation, stored
from fxopt.backends.tvm.values import Slot, Value
from fxopt.errors import Unsupported
from fxopt.ir.packing import unpack


def constants(low: Lowering, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and bias, which must be known."""
    codes = low.constant(call["codes"])
    if codes is None or codes.dtype != torch.int8:
        raise Unsupported("its codes are not int8 constants")
    bias = None if call["bias"] is None else low.weight(call["bias"], "bias")
    return codes, low.weight(call["scales"], "scales"), bias


def wanted(low: Lowering, node: fx.Node) -> Levels | None:
    """The levels that all users round the value to; None when one takes it otherwise."""
    found = {_wanted_by(low, user, node) for user in node.users}
    only = found.pop() if len(found) == 1 else None
    if node in low.graph.result_nodes or not only:
        return None
    return Levels(*only, preferred(low.program.machine).x)


def _wanted_by(low: Lowering, user: fx.Node, node: fx.Node) -> tuple[float, int] | None:
    if operator_name(user) in VIEWS and user.args[0] is node:
        levels = wanted(low, user)
        return None if levels is None else (levels.scale, levels.zero)
    if operator_name(user) == "linear_w8a8" and user.args[0] is node:
        return float(user.args[4]), int(user.args[5])  # type: ignore[arg-type]
    return None


def rounding(low: Lowering, node: fx.Node, outputs: int) -> tuple[Levels | None, torch.Tensor | None]:
    """The levels that a product's result is rounded to, and a factor per output that its one user applies before."""
    levels = wanted(low, node)
    (user, *others) = node.users or (None,)
    if levels is not None or others or user is None or operator_name(user) != "mul" or node in low.graph.result_nodes:
        return levels, None
    other = next((item for item in user.args if item is not node), None)
    factors = low.constant(other)
    if factors is None or factors.dtype != torch.float32 or factors.shape[-1:] != (outputs,):
        return None, None
    levels = wanted(low, user) if factors.numel() == outputs else None
    if levels is None:
        return None, None
    low.fused[user] = low.fused.get(node, node)
    return levels, factors.flatten()


def last(low: Lowering, node: fx.Node) -> fx.Node:
    """The node whose value a product gives: itself, or the activation behind it."""
    return next((after for after, product in low.fused.items() if product is node), node)


def in_rows(low: Lowering, codes: Value, dot: Dot) -> Value:
    """Codes whose rows are padded with zeros to whole groups."""
    inner = codes.shape[-1]
    whole = in_groups(inner, dot)
    if inner == whole:
        return codes
    made = low.program.value((*codes.shape[:-1], whole), codes.dtype)
    low.emit(("constant", 0, codes.dtype), (), made)
    low.copy(codes, made.viewed(codes.shape, made.strides))
    return made


def numbers(low: Lowering, argument: fx.Node, levels: Levels) -> Value:
    """q - zero as float32: whole numbers."""
    codes = low.codes(argument, levels)
    made = low.program.value(codes.shape)
    low.emit(("decode", ("load", 0), replace(levels, scale=1.0)), (codes,), made)
    return made


def linear_w8a8(low: Lowering, call: Call) -> Any:
    """Static levels of x."""
    codes, scales, bias = constants(low, call)
    dot = dot_for(low.program.machine, codes.numpy())
    levels = Levels(float(call["x_scale"]), int(call["x_zero"]), dot.x)
    q = in_rows(low, low.codes(call["x"], levels), dot)
    product = _Product(low, call.node, codes, scales * levels.scale, bias, dot)
    return product.of(q, levels.shift - levels.zero, None)


def linear_w8a8_dynamic(low: Lowering, call: Call) -> Any:
    """The levels of x are found at run time."""
    codes, scales, bias = constants(low, call)
    dot = dot_for(low.program.machine, codes.numpy())
    found, q = _ranged(low, call["x"], dot)
    return _Product(low, call.node, codes, scales, bias, dot).of(in_rows(low, q, dot), 1, found)


def _ranged(low: Lowering, argument: fx.Node, dot: Dot) -> tuple[Slot, Value]:
    """The range of a value, and its codes; made once for all that take them."""
    if (argument, dot.x) not in low.ranged:
        source = low.dense(argument, "float32")
        found = low.program.slot(2)
        made = low.program.value(source.shape, dot.x.dtype)
        if made.count:
            low.program.call(find_range, (made.count,), source.slot, found)
            low.program.call(quantize_to_range, (made.count, dot.x), source.slot, found, made.slot)
        low.ranged[argument, dot.x] = found, made
    return low.ranged[argument, dot.x]


@dataclass(frozen=True)
class _Product:
    """A linear of codes [outputs, inner]: all of them, or the blocks that are not zero."""

    low: Lowering
    node: fx.Node
    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    dot: Dot

    def of(self, q: Value, factor: int, found: Slot | None) -> Value | Coded:
        """The product with codes of x; sums start from `factor` times the weight's column sums."""
        low, program, codes = self.low, self.low.program, self.codes.numpy()
        outputs, inner = codes.shape
        act = activation(low, self.node)
        levels, factors = rounding(low, last(low, self.node), outputs)
        size = Product(math.prod(q.shape[:-1]), inner, outputs, act, found is not None, levels, factors is not None)
        made = program.value((*q.shape[:-1], outputs), "float32" if levels is None else levels.stored.dtype)
        if made.count:
            blocks = sparse_form(codes, size.rows, self.dot, program.machine)
            width = program.machine.columns if blocks is None else blocks.width
            floats = [_floats(self.scales), None if self.bias is None else self.bias.numpy()]
            results = [program.constant(factor * column_sums(codes, width))]
            results += [program.constant(pack_bias(array, outputs, width)) for array in floats]
            results += [] if found is None else [found]
            if factors is not None:
                results.append(program.constant(pack_bias(_floats(factors), outputs, width)))
            if blocks is None:
                self._dense(q, size, results, made)
            else:
                self._sparse(q, size, blocks, results, made)
        return made if levels is None else Coded(made, levels)

    def _dense(self, q: Value, size: Product, results: list[Slot], made: Value) -> None:
        program, machine = self.low.program, self.low.program.machine
        kind, count = work_space(size, self.dot, machine)
        space = [program.slot(count, kind)] if count else []
        weights = program.constant(pack_codes(self.codes.numpy(), machine.columns, self.dot))
        program.call(dense_int8, (size, self.dot), q.slot, weights, *results, *space, made.slot)

    def _sparse(self, q: Value, size: Product, blocks: Blocks, results: list[Slot], made: Value) -> None:
        program, high = self.low.program, panel_rows(size, self.dot)
        slots = [program.constant(array) for array in (blocks.weights, blocks.inputs, blocks.firsts)]
        space = [program.slot(high * q.shape[-1], q.dtype)] if high else []
        given = (size, blocks.groups, blocks.width, self.dot)
        program.call(bsr_int8, given, q.slot, *slots, *results, *space, made.slot)


def linear_nbits(low: Lowering, call: Call) -> Value:
    """Weights of 2 to 8 bits; x is rounded per row and group if the operator says so, the product is in floats."""
    packed, zeros = low.constant(call["packed"]), None if call["zeros"] is None else low.constant(call["zeros"])
    if packed is None or (call["zeros"] is not None and zeros is None):
        raise Unsupported("its codes are computed at run time; expected constants")
    bits, group, inner = (int(low.number(call[name])) for name in ("bits", "group", "columns"))
    scales, machine = low.weight(call["scales"], "scales"), low.program.machine
    bias = None if call["bias"] is None else low.weight(call["bias"], "bias").numpy()
    source = low.dense(call["x"], "float32")
    outputs, rows = packed.shape[0], math.prod(source.shape[:-1])
    act = activation(low, call.node)
    made = low.program.value((*source.shape[:-1], outputs))
    if not made.count:
        return made
    if int(low.number(call["activation_bits"])) == 8:
        given, source = source, low.program.value(source.shape)
        low.program.call(round_groups, (rows, inner, group), given.slot, source.slot)
    middle = torch.full_like(scales, float(1 << (bits - 1))) if zeros is None else zeros.float()
    codes = unpack(packed, bits, inner).to(torch.uint8).numpy()
    form = pack_bits(codes, scales.numpy(), middle.numpy(), bits, group, machine.columns)
    shifts = low.program.constant(pack_bias(bias, outputs, machine.columns))
    stored(low, source, form, (rows, inner, outputs), shifts, made, act)
    return made


def _floats(values: torch.Tensor) -> Any:
    return values.numpy().astype(np.float32)


RULES: dict[str, Rule] = {"linear_w8a8": linear_w8a8, "linear_w8a8_dynamic": linear_w8a8_dynamic,
                          "linear_nbits": linear_nbits}  # fmt: skip
