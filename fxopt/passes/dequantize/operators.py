"""The float form of every integer operator: what it computes between dequantising and quantising.

A form gets the walk (which gives operands as floats), a builder before the operator, and the operator. It raises
`Unsupported` where an operand or attribute has no float form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from fxopt.errors import Unsupported
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.references.contrib_matmul import n_bits_weight
from fxopt.ir.onnx.references.quantize import dequantize_linear
from fxopt.ir.onnx.registry import Call
from fxopt.ir.views.common import argument, is_onnx, only_user
from fxopt.ir.views.quantized import dynamically_quantized, integer_product

_CONTRIB = "com.microsoft"


class Operands(Protocol):
    """What a form asks the walk for."""

    graph: Graph
    weights: bool
    activations: bool

    def real(self, codes: Any, scale: Any, zero: Any, axis: int = 1) -> fx.Node:
        """scale * (codes - zero) as a float node."""
        ...


@dataclass(frozen=True)
class Made:
    """A float value, and the scale and zero point to which the integer operator rounded it (None: to none)."""

    value: fx.Node
    scale: fx.Node | None = None
    zero: fx.Node | None = None
    replaces: fx.Node | None = None  # a later node than the integer operator, whose value this is


FloatForm = Callable[[Operands, Builder, fx.Node], Made]


def _arguments(node: fx.Node, count: int) -> list[Any]:
    return [*node.args, *[None] * count][:count]


def _attributes(node: fx.Node) -> dict[str, Any]:
    """Those of the float operator.

    Raises:
        Unsupported: the operator works on channels-last tensors.
    """
    if node.kwargs.get("channels_last", 0):
        raise Unsupported("it takes channels last, which the float operator does not")
    return {name: value for name, value in node.kwargs.items() if name != "channels_last"}


def _one(walk: Operands, scale: Any, of: str) -> None:
    """Scales per row of a computed operand have no DequantizeLinear."""
    constant = walk.graph.constant(scale)
    if constant is not None and constant.numel() != 1:
        raise Unsupported(f"{of} has {constant.numel()} scales; expected one")


def _bias(walk: Operands, builder: Builder, node: fx.Node, bias: Any, scales: tuple[Any, Any]) -> list[fx.Node]:
    """int32 multiples of the product of both operands' scales, as floats."""
    if bias is None:
        return []
    codes, *units = (walk.graph.constant(value) for value in (bias, *scales))
    if codes is None or None in units:
        raise Unsupported("its bias, or the scale of it, is computed at run time")
    first, second = (unit.reshape(-1).double() for unit in units if unit is not None)
    value = (codes.double() * (first * second)).float()
    return [builder.const(value, f"{label(node)}_bias")]


def _conv(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = _arguments(node, 9)
    attributes = _attributes(node)
    inputs = [walk.real(x, x_scale, x_zero), walk.real(w, w_scale, w_zero, axis=0)]
    inputs += _bias(walk, builder, node, bias, (x_scale, w_scale))
    return Made(builder.onnx("Conv", *inputs, **attributes), y_scale, y_zero)


def _matmul(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = _arguments(node, 8)
    _one(walk, a_scale, "the first operand")
    _one(walk, y_scale, "the result")
    return Made(builder.matmul(walk.real(a, a_scale, a_zero), walk.real(b, b_scale, b_zero, axis=-1)), y_scale, y_zero)


def _gemm(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    a, a_scale, a_zero, b, b_scale, b_zero, c, y_scale, y_zero = _arguments(node, 9)
    alpha, axis = node.kwargs.get("alpha", 1.0), 0 if node.kwargs.get("transB", 0) else 1
    inputs = [walk.real(a, a_scale, a_zero), walk.real(b, b_scale, b_zero, axis=axis)]
    inputs += _bias(walk, builder, node, c, (a_scale, b_scale))
    attributes = dict(node.kwargs)
    if alpha != 1.0 and len(inputs) > 2:
        attributes["beta"] = alpha  # QGemm multiplies the sum with its bias by alpha
    return Made(builder.onnx("Gemm", *inputs, **attributes), y_scale, y_zero)


def _to_float(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = _arguments(node, 7)
    x = dynamically_quantized(a, a_zero, a_scale) if walk.activations else None
    if x is None:
        _one(walk, a_scale, "the first operand")
        x = walk.real(a, a_scale, a_zero)
    return _product(builder, x, walk.real(b, b_scale, b_zero, axis=-1), bias)


def _dynamic(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    a, b, b_scale, b_zero, bias = _arguments(node, 5)
    _needs_activations(walk)
    return _product(builder, a, walk.real(b, b_scale, b_zero, axis=-1), bias)


def _product(builder: Builder, x: Any, weight: fx.Node, bias: Any) -> Made:
    y = builder.matmul(x, weight)
    return Made(y if bias is None else builder.add(y, bias))


def _needs_activations(walk: Operands) -> None:
    if not walk.activations:
        raise Unsupported("activations=False keeps its input, whose range is found at run time")


def _integer_product(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    found = integer_product(walk.graph, node)
    if found is None:
        raise Unsupported("it is not the usual DynamicQuantizeLinear, product, Cast and product with both scales")
    _needs_activations(walk)
    codes = walk.graph.constant(node.args[1])
    if codes is None or not walk.weights:
        raise Unsupported("its weight is computed at run time" if codes is None else "weights=False keeps its codes")
    convolves = getattr(node.target, "op_type", "") == "ConvInteger"
    weight = _scaled(codes, found.scale, walk.graph.constant(argument(node, 3)), 0 if convolves else -1)
    builder = Builder(walk.graph, found.result, builder.makers[-1], like=node)
    constant = builder.const(weight, f"{label(node)}_weight")
    if convolves:
        bias, result = _added(walk.graph, found.result, codes)
        builder = Builder(walk.graph, result, builder.makers[-1], like=node)
        inputs = [constant] if bias is None else [constant, builder.const(bias, f"{label(node)}_bias")]
        return Made(builder.onnx("Conv", found.x, *inputs, **_attributes(node)), replaces=result)
    return Made(builder.matmul(found.x, constant), replaces=found.result)


def _added(graph: Graph, result: fx.Node, codes: Tensor) -> tuple[Tensor | None, fx.Node]:
    """The bias that is added to a convolution's result, perhaps reshaped in the graph, and the sum; else the result."""
    total = only_user(result)
    if not is_onnx(total, "Add"):
        return None, result
    other: Any = total.args[1] if total.args[0] is result else total.args[0]
    shape = graph.constant(other.args[1]) if is_onnx(other, "Reshape") else None
    bias = graph.constant(other if shape is None else other.args[0])
    if bias is None:
        return None, result
    sizes = list(bias.shape) if shape is None else shape.tolist()
    wanted = [len(codes), *[1] * (codes.dim() - 2)]
    if bias.numel() != len(codes) or sizes[-len(wanted) :] not in (wanted, [-1, *wanted[1:]]):
        return None, result
    return bias.reshape(-1), total


def _scaled(codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """(codes - zero) * scale, each with one element or one per index of the axis."""
    count = codes.shape[axis]
    parts = [part if part is None else part.reshape(-1) for part in (scale, zero)]
    for part in parts:
        if part is not None and part.numel() not in (1, count):
            raise Unsupported(f"it has {part.numel()} scales or zero points for {count} channels")
    spread = [part if part is None else part.expand(count) for part in parts]
    value: Tensor = dequantize_linear(Call(21), codes, spread[0], spread[1], axis=axis % codes.dim())
    return value


def _n_bits(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    a, b, scales, zeros, index, bias = _arguments(node, 6)
    if not walk.weights:
        raise Unsupported("weights=False keeps its codes")
    constants = [walk.graph.constant(value) for value in (b, scales, zeros, index, bias)]
    given = zip((b, scales, zeros, index, bias), constants, strict=True)
    if any(value is not None and constant is None for value, constant in given):
        raise Unsupported("its weight is computed at run time")
    options: dict[str, Any] = {"block_size": 32, "bits": 4, **node.kwargs}
    if options.get("weight_prepacked", 0):
        raise Unsupported("its weight is in the layout of one machine")
    codes, scale, zero, order, added = constants
    if codes is None or scale is None or 0 in codes.shape:
        raise Unsupported("its weight is empty")
    dtype = builder.dtype(a) or scale.dtype
    sizes = {name: int(options[name]) for name in ("K", "N", "block_size", "bits")}
    weight = n_bits_weight(codes, scale, zero, order, dtype, **sizes).to(dtype)
    return Made(builder.linear(a, weight, added, label(node)))


def _elementwise(op_type: str, operands: int) -> FloatForm:
    """Each operand comes with scale and zero point, and then those of the result."""

    def form(walk: Operands, builder: Builder, node: fx.Node) -> Made:
        arguments = _arguments(node, 3 * operands + 2)
        inputs = [walk.real(*arguments[3 * index : 3 * index + 3]) for index in range(operands)]
        return Made(builder.onnx(op_type, *inputs, **_attributes(node)), *arguments[-2:])

    return form


def _softmax(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    x, x_scale, x_zero, y_scale, y_zero = _arguments(node, 5)
    axis: Any = node.kwargs.get("axis", -1)
    if axis != -1 and node.kwargs.get("opset", 13) < 13:  # type: ignore[operator]
        raise Unsupported(f"it takes all axes from {axis} on together")
    return Made(builder.softmax(walk.real(x, x_scale, x_zero), axis), y_scale, y_zero)


def _mean(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    x, x_scale, x_zero, y_scale, y_zero = _arguments(node, 5)
    axes: Any = node.kwargs.get("axes")
    if not axes:
        raise Unsupported("it names no axes")
    keeps = bool(node.kwargs.get("keepdims", 1))
    return Made(builder.mean(walk.real(x, x_scale, x_zero), list(axes), keeps), y_scale, y_zero)


def _concat(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    y_scale, y_zero, *inputs = node.args
    triples = zip(inputs[0::3], inputs[1::3], inputs[2::3], strict=True)
    axis: Any = node.kwargs["axis"]
    return Made(builder.concat([walk.real(*triple) for triple in triples], axis), y_scale, y_zero)  # type: ignore[arg-type]


def _where(walk: Operands, builder: Builder, node: fx.Node) -> Made:
    condition, *operands, y_scale, y_zero = _arguments(node, 9)
    x, y = walk.real(*operands[:3]), walk.real(*operands[3:])
    return Made(builder.where(condition, x, y), y_scale, y_zero)


FLOAT_FORMS: dict[tuple[str, str], FloatForm] = {
    ("", "QLinearConv"): _conv,
    (_CONTRIB, "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (_CONTRIB, "QGemm"): _gemm,
    ("", "MatMulInteger"): _integer_product,
    ("", "ConvInteger"): _integer_product,
    (_CONTRIB, "MatMulIntegerToFloat"): _to_float,
    (_CONTRIB, "DynamicQuantizeMatMul"): _dynamic,
    (_CONTRIB, "MatMulNBits"): _n_bits,
    (_CONTRIB, "QLinearAdd"): _elementwise("Add", 2),
    (_CONTRIB, "QLinearMul"): _elementwise("Mul", 2),
    (_CONTRIB, "QLinearSigmoid"): _elementwise("Sigmoid", 1),
    (_CONTRIB, "QLinearLeakyRelu"): _elementwise("LeakyRelu", 1),
    (_CONTRIB, "QLinearAveragePool"): _elementwise("AveragePool", 1),
    (_CONTRIB, "QLinearGlobalAveragePool"): _elementwise("GlobalAveragePool", 1),
    (_CONTRIB, "QLinearSoftmax"): _softmax,
    (_CONTRIB, "QLinearReduceMean"): _mean,
    (_CONTRIB, "QLinearConcat"): _concat,
    (_CONTRIB, "QLinearWhere"): _where,
}
