"""Linear layers and matrix products, in the form that the weight's zeros and values allow.

Enough zeros in blocks of outputs x 1 input: block-sparse. n of m inputs that a panel of outputs shares: n of m. Two of
four inputs of each output's own, or powers of two: fewer bytes at the speed of a dense product. Else dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.tvm.kernels.activations import Activation
from fxopt.backends.tvm.kernels.bsr import Bsr, bsr, pack_bsr
from fxopt.backends.tvm.kernels.dense import dense, pack_bias, pack_dense
from fxopt.backends.tvm.kernels.matmul import matmul
from fxopt.backends.tvm.kernels.nm import nm, pack_nm
from fxopt.backends.tvm.kernels.panels import Panels, pack_powers, pack_two_of_four, panel_dense, scratch_size
from fxopt.backends.tvm.lowering import Call, Lowering, Rule, operator_name
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import Slot, Value
from fxopt.errors import Unsupported

_WIDTHS = (16, 8, 4)
_SPARSITIES = ((1, 4), (2, 8), (2, 4), (4, 8))  # the emptiest first
_EMPTIER = 0.8  # blocks that keep less than this share of what a pattern keeps are better
_ROWS_THAT_PAY = 64  # for which decoding a panel is lost in the time of the product


def activation(low: Lowering, node: fx.Node) -> Activation:
    """The activation that is the node's one user: the product then applies it, and the user has the same value."""
    if len(node.users) != 1 or node in low.graph.result_nodes:
        return ""
    (user,) = node.users
    if user.op != "call_function" or not user.args or user.args[0] is not node:
        return ""
    name = _activation_name(user)
    if name:
        low.fused[user] = node
    return name


def _activation_name(user: fx.Node) -> Activation:
    name = operator_name(user)
    if name in ("relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh"):
        return name  # type: ignore[return-value]
    if name == "gelu":
        return "gelu_tanh" if user.kwargs.get("approximate") == "tanh" else "gelu"
    ends = (*user.args[1:], *user.kwargs.values())
    if name in ("hardtanh", "clamp") and [float(end) for end in ends if isinstance(end, (int, float))] == [0.0, 6.0]:
        return "relu6"
    return ""


def linear(low: Lowering, node: fx.Node, x: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Value:
    """y [..., out] = act(x [..., in] @ weight [out, in].T + bias)."""
    source = low.dense(x, "float32")
    outputs, inner = weight.shape
    rows = math.prod(source.shape[:-1])
    made = low.program.value((*source.shape[:-1], outputs))
    act = activation(low, node)
    if made.count == 0:
        return made
    machine, program = low.program.machine, low.program
    matrix = weight.numpy()
    shift = None if bias is None else bias.numpy()
    pattern = next(_patterns(matrix, machine), None)
    blocks = _blocks(matrix, machine)
    if pattern is not None and (blocks is None or blocks.density > _EMPTIER * pattern[0] / pattern[1]):
        n, m, width = pattern
        shared = pack_nm(matrix, n, m, width)
        slots = [program.constant(item) for item in (shared.values, shared.inputs, pack_bias(shift, outputs, width))]
        program.call(nm, (rows, inner, outputs, n, m, width), source.slot, *slots, made.slot, activation=act)
        return made
    if blocks is not None:
        sizes = (rows, inner, outputs, len(blocks.values), blocks.width)
        given = (blocks.values, blocks.inputs, blocks.starts, pack_bias(shift, outputs, blocks.width))
        slots = [program.constant(item) for item in given]
        program.call(bsr, sizes, source.slot, *slots, made.slot, activation=act)
        return made
    shifts = program.constant(pack_bias(shift, outputs, machine.columns))
    found = compact(matrix, machine.columns) if rows >= _ROWS_THAT_PAY else None
    if found is not None:
        stored(low, source, found, (rows, inner, outputs), shifts, made, act)
        return made
    slots = [program.constant(pack_dense(matrix, machine.columns)), shifts]
    program.call(dense, (rows, inner, outputs), source.slot, *slots, made.slot, activation=act)
    return made


def compact(matrix: Any, width: int) -> tuple[Panels, list[Any]] | None:
    """A form of the weight in fewer bytes; None: there is none."""
    return pack_powers(matrix, width) or pack_two_of_four(matrix, width)


def stored(
    low: Lowering, source: Value, form: tuple[Panels, list[Any]], sizes: tuple[int, int, int], bias: Slot, made: Value,
    act: Activation,
) -> None:  # fmt: skip
    """A product with panels that are decoded on the way."""
    program, (panels, arrays) = low.program, form
    slots = [program.constant(array) for array in arrays]
    scratch = program.slot(scratch_size(panels, sizes[1], program.machine))
    program.call(panel_dense, (*sizes, panels), source.slot, *slots, bias, scratch, made.slot, activation=act)


def _patterns(matrix: Any, machine: Machine) -> Iterator[tuple[int, int, int]]:
    """n of m inputs that enough neighbouring outputs share to gain time, the widest first."""
    widths = (machine.columns, *(width for width in _WIDTHS if machine.lanes <= width < machine.columns))
    for width in widths if machine.family != "x86" else widths[:1]:
        panels = [matrix[start : start + width] for start in range(0, len(matrix), width)]
        used = np.stack([(panel != 0).any(0) for panel in panels])  # [panels, in]
        for n, m in _SPARSITIES:
            if used.shape[1] and used.shape[1] % m == 0 and int(used.reshape(len(used), -1, m).sum(-1).max()) <= n:
                yield n, m, width


def _blocks(matrix: Any, machine: Machine) -> Bsr | None:
    """The weight in blocks of some outputs x 1 input, if enough of them are zero."""
    for width in (machine.columns, *(w for w in _WIDTHS if w != machine.columns)):
        packed = pack_bsr(matrix, width)
        if packed.density < worthwhile_density(width, machine) and len(packed.values):
            return packed
    return None


def worthwhile_density(width: int, machine: Machine) -> float:
    """The density of blocks of `width` outputs below which skipping the others wins (benchmarks/tvm_kernels.py).

    A narrow block fills fewer vectors for each value of x that is loaded; one narrower than a vector never pays.
    """
    if width >= machine.columns:
        return 0.6
    if width < machine.lanes:
        return 0.0
    return 0.2 if machine.family == "x86" else 0.4


def _linear(low: Lowering, call: Call) -> Value:
    if low.constant(call["weight"]) is None:
        weight = low.value(call["weight"])
        flipped = weight.viewed(weight.shape[::-1], weight.strides[::-1])
        product = _product(low, call.node, low.value(call["input"]), flipped)
        if call["bias"] is None:
            return product
        made = low.program.value(product.shape)
        low.emit(("add", ("load", 0), ("load", 1)), (product, low.value(call["bias"])), made)
        return made
    bias = None if call["bias"] is None else low.weight(call["bias"], "bias")
    return linear(low, call.node, call["input"], low.weight(call["weight"], "weight"), bias)


def _addmm(low: Lowering, call: Call) -> Value:
    if call["alpha"] != 1 or call["beta"] != 1:
        raise Unsupported(f"has alpha {call['alpha']} and beta {call['beta']}, expected 1 and 1")
    if low.constant(call["mat2"]) is None:
        product = _product(low, call.node, low.value(call["mat1"]), low.value(call["mat2"]))
        made = low.program.value(product.shape)
        low.emit(("add", ("load", 0), ("load", 1)), (product, low.value(call["self"])), made)
        return made
    bias = low.weight(call["self"], "bias")
    if bias.dim() != 1:
        raise Unsupported(f"its bias has shape {tuple(bias.shape)}, expected one axis")
    weight = low.weight(call["mat2"], "weight").t().contiguous()
    return linear(low, call.node, call["mat1"], weight, bias.expand(weight.shape[0]).contiguous())


def _matmul(low: Lowering, call: Call) -> Value:
    x, w = call["self"], call.get("other", call.get("mat2"))
    known = low.constant(w)
    if known is not None and known.dim() == 2 and low.metas[x].dim() >= 2:
        return linear(low, call.node, x, low.weight(w, "weight").t().contiguous(), None)
    return _product(low, call.node, low.value(x), low.value(w))


def _product(low: Lowering, node: fx.Node, x: Value, w: Value) -> Value:
    if len(x.shape) < 2 or len(w.shape) < 2:
        raise Unsupported(f"multiplies shapes {x.shape} and {w.shape}; expected two axes at least")
    if x.dtype != "float32" or w.dtype != "float32":
        raise Unsupported(f"multiplies {x.dtype} and {w.dtype}, expected float32")
    lead = tuple(torch.broadcast_shapes(x.shape[:-2], w.shape[:-2]))  # type: ignore[no-untyped-call]
    (x, x_step), (w, w_step) = (_batched(low, item, lead) for item in (x, w))
    rows, inner, outputs = x.shape[-2], x.shape[-1], w.shape[-1]
    made = low.program.value((*lead, rows, outputs))
    if made.count:
        sizes = (math.prod(lead), rows, inner, outputs, x_step, w_step)
        low.program.call(matmul, sizes, x.slot, w.slot, made.slot)
    return made


def _batched(low: Lowering, value: Value, lead: tuple[int, ...]) -> tuple[Value, int]:
    """The operand, contiguous, and the distance of its matrices."""
    if math.prod(value.shape[:-2]) == 1:
        return low.dense(value), 0
    shape = (*lead, *value.shape[-2:])
    missing = (0,) * (len(shape) - len(value.shape))
    pairs = zip(value.shape, value.strides, strict=True)
    strides = (*missing, *(0 if size == 1 else stride for size, stride in pairs))
    return low.dense(value.viewed(shape, strides)), value.shape[-2] * value.shape[-1]


RULES: dict[str, Rule] = {
    "linear": _linear, "addmm": _addmm, "matmul": _matmul, "mm": _matmul, "bmm": _matmul,
}  # fmt: skip
