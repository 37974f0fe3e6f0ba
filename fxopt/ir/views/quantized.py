"""`Quantized`: an operator that came with quantised weights, in the spellings that quantisers of ONNX files write.

QDQ: a float operator behind DequantizeLinear. QOperator: QLinearConv and the like. Dynamic: DynamicQuantizeLinear
before an integer product whose sum is multiplied with both scales. Weight-only: MatMulNBits, or DequantizeLinear of the
weight alone. Source: the ONNX specification; ONNX Runtime's documents "Quantize ONNX Models" and "Contrib Operators".
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import constant_value, evaluate
from fxopt.ir.views.common import argument, is_onnx, only_user
from fxopt.ir.views.eight_bit import passes_levels_on

_CONTRIB = "com.microsoft"
_FIXED, _RUN_TIME = "with fixed ranges", "with ranges found at run time"
_BEHIND = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # float operators that a quantiser puts behind DequantizeLinear

# Positions of the weight's codes, scale and zero point, and how activations are treated, by domain and operator.
OPERATORS: dict[tuple[str, str], tuple[int, int | None, int, str]] = {
    ("", "QLinearConv"): (3, 4, 5, _FIXED),
    (_CONTRIB, "QLinearConv"): (3, 4, 5, _FIXED),
    ("", "QLinearMatMul"): (3, 4, 5, _FIXED),
    (_CONTRIB, "QGemm"): (3, 4, 5, _FIXED),
    ("", "MatMulInteger"): (1, None, 3, _RUN_TIME),
    ("", "ConvInteger"): (1, None, 3, _RUN_TIME),
    (_CONTRIB, "DynamicQuantizeMatMul"): (1, 2, 3, _RUN_TIME),
    (_CONTRIB, "MatMulIntegerToFloat"): (1, 3, 5, _RUN_TIME),
}
# Operators with quantised weights that are named, and not looked into.
_OTHERS = (
    "MatMulBnb4", "MatMulNBitsMlp", "MatMulNBitsQkv", "MatMulNBitsQLoRA", "MatMulBlockQuantizedFp8Weight", "QAttention",
    "QMoE", "DynamicQuantizeLSTM", "QOrderedMatMul", "GatherBlockQuantized",
)  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """An operator with quantised weights: how it says so, the bits of a weight, and both operands in words."""

    node: fx.Node
    form: str  # "QDQ", or the operator's name
    bits: int | None  # of the weights; None when they are not constant
    weights: str  # "int8 weights, symmetric per channel"
    activations: str  # "uint8 activations with fixed ranges"

    def __str__(self) -> str:
        return f"{self.weights}; {self.activations} ({self.form})"


@dataclass(frozen=True)
class IntegerProduct:
    """MatMulInteger or ConvInteger of a value quantised at run time, up to the product that makes floats of its sum."""

    node: fx.Node
    x: fx.Node  # the float value before DynamicQuantizeLinear
    scale: torch.Tensor  # of the weight
    result: fx.Node  # float(sum) * x's scale * scale


def quantized(graph: Graph, node: fx.Node) -> Quantized | None:
    """What the operator came with; None when its weights are not quantised."""
    if graph.origin != "onnx" or node.op != "call_function":
        return None
    target: Any = node.target
    key = getattr(target, "domain", ""), getattr(target, "op_type", "")
    if key in OPERATORS:
        return _integer(graph, node, key[1], *OPERATORS[key])
    if key == (_CONTRIB, "MatMulNBits"):
        return _few_bits(node)
    if key[0] == _CONTRIB and key[1] in _OTHERS:
        return Quantized(node, key[1], None, "quantised weights", "activations as the operator takes them")
    if is_onnx(node, "Gather"):
        return _table(graph, node)
    return _behind(graph, node) if is_onnx(node, *_BEHIND) else None


def quantized_operators(graph: Graph) -> Iterator[Quantized]:
    """Every operator that came with quantised weights, in execution order."""
    for node in graph.calls():
        found = quantized(graph, node)
        if found is not None:
            yield found


def dynamically_quantized(codes: object, zero: object, scale: object = None) -> fx.Node | None:
    """The float value whose DynamicQuantizeLinear gives these codes, this zero point and (where given) this scale."""
    source = codes.args[0] if isinstance(codes, fx.Node) and codes.target is operator.getitem else None
    if not is_onnx(source, "DynamicQuantizeLinear"):
        return None
    places = ((codes, 0), (zero, 2), *(((scale, 1),) if scale is not None else ()))
    if any(not isinstance(value, fx.Node) or value.args != (source, place) for value, place in places):
        return None
    x = source.args[0]
    return x if isinstance(x, fx.Node) else None


def integer_product(graph: Graph, node: fx.Node) -> IntegerProduct | None:
    """The float product that MatMulInteger or ConvInteger is part of; None when it is not the usual spelling."""
    if not is_onnx(node, "MatMulInteger", "ConvInteger") or len(node.args) < 3:
        return None
    x = dynamically_quantized(node.args[0], node.args[2])
    current = only_user(node)
    if x is None or not is_onnx(current, "Cast"):
        return None
    source = node.args[0].args[0]  # type: ignore[union-attr]
    scale, scaled = torch.ones(()), False
    while True:
        product = only_user(current)
        if not is_onnx(product, "Mul") or product.args[0] is product.args[1]:
            return None
        other = product.args[1] if product.args[0] is current else product.args[0]
        for factor in _factors(other):
            constant = graph.constant(factor)
            if constant is not None:
                scale = scale * constant.float()
            elif isinstance(factor, fx.Node) and factor.args == (source, 1) and not scaled:
                scaled = True
            else:
                return None
        current = product
        if scaled and (scale.dim() or not torch.equal(scale, torch.ones(()))):
            return IntegerProduct(node, x, scale, product)


def _factors(value: Any) -> list[Any]:
    return [item for part in value.args[:2] for item in _factors(part)] if is_onnx(value, "Mul") else [value]


def codes_of(graph: Graph, value: object) -> Any:
    """A constant, also an array of a type that torch lacks; None for everything else."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = constant_value(graph, value)
    return found if isinstance(found, (torch.Tensor, np.ndarray)) else None


def constant_source(graph: Graph, value: Any) -> fx.Node | None:
    """The constant that integer codes are made of: themselves, or what is moved and quantised in the graph."""
    while passes_levels_on(value) or is_onnx(value, "QuantizeLinear"):
        if any(used.op != "get_attr" for used in value.all_input_nodes if used is not value.args[0]):
            return None
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def evaluated(graph: Graph, value: Any) -> Any:
    """The codes that `constant_source` finds a constant for; None for what is computed from inputs."""
    if constant_source(graph, value) is None:
        return None
    if value.op == "get_attr":
        return codes_of(graph, value)
    first = evaluated(graph, value.args[0])
    rest = fx.map_arg(value.args[1:], lambda used: constant_value(graph, used))
    return evaluate(graph, value, (first, *rest), dict(value.kwargs))


# ---- descriptions


def _table(graph: Graph, node: fx.Node) -> Quantized | None:
    """Rows of a constant table, dequantised before or after they are looked up."""
    table: Any = node.args[0]
    behind = table
    if not is_onnx(behind, "DequantizeLinear"):
        behind = next((user for user in node.users if is_onnx(user, "DequantizeLinear") and user.args[0] is node), None)
    if behind is None:
        return None
    source = constant_source(graph, table.args[0] if behind is table else table)
    codes = None if source is None else codes_of(graph, source)
    if codes is None or "float32" in str(codes.dtype):
        return None
    block: Any = behind.kwargs.get("block_size", 0)
    name = _type_name(codes)
    text = _weights(name, _zeros(graph, argument(behind, 2)), _per(graph, argument(behind, 1), block))
    return Quantized(node, "QDQ", _bits(name), text, "a table that is looked up")


def _behind(graph: Graph, node: fx.Node) -> Quantized | None:
    """A float operator whose weight is dequantised in the graph, perhaps transposed afterwards."""
    x: Any = node.args[0]
    weight: Any = argument(node, 1)
    while is_onnx(weight, "Transpose", "Reshape"):
        weight = weight.args[0]
    if not is_onnx(weight, "DequantizeLinear") and not is_onnx(weight, "DequantizeLinear", domain=_CONTRIB):
        return None
    source = constant_source(graph, weight.args[0])
    if source is None:
        return None
    scale, zero = argument(weight, 1), argument(weight, 2)
    codes = codes_of(graph, zero if zero is not None else source)
    name = "uint8" if codes is None or "float32" in str(codes.dtype) else _type_name(codes)
    block: Any = weight.kwargs.get("block_size", 0)
    text = _weights(name, _zeros(graph, zero), _per(graph, scale, block))
    return Quantized(node, "QDQ", _bits(name), text, _activations(graph, x))


def _integer(
    graph: Graph, node: fx.Node, form: str, codes_at: int, scale_at: int | None, zero_at: int, ranges: str
) -> Quantized:
    codes, zero = codes_of(graph, argument(node, codes_at)), argument(node, zero_at)
    if form == "MatMulIntegerToFloat" and dynamically_quantized(*(argument(node, at) for at in (0, 4, 2))) is None:
        ranges = _FIXED
    if codes is None:
        return Quantized(node, form, None, "both operands computed at run time", f"8-bit activations {ranges}")
    scale = graph.constant(argument(node, scale_at)) if scale_at is not None else None
    if scale is None:
        product = integer_product(graph, node)
        scale = None if product is None else product.scale
    one = (scale is None or scale.numel() == 1) and np.size(_array(graph, zero)) <= 1
    name = _type_name(codes)
    text = _weights(name, _zeros(graph, zero), "per tensor" if one else "per channel")
    return Quantized(node, form, _bits(name), text, f"8-bit activations {ranges}")


def _few_bits(node: fx.Node) -> Quantized:
    """MatMulNBits: without zero points the middle of the range is zero."""
    options: dict[str, Any] = {"bits": 4, "block_size": 32, **node.kwargs}
    bits, block = int(options["bits"]), int(options["block_size"])
    symmetric = len(node.args) < 4 or node.args[3] is None
    rounded = options.get("accuracy_level", 0) == 4
    activations = "activations rounded to 8 bits at run time" if rounded else "float activations"
    kind = "symmetric" if symmetric else "asymmetric"
    return Quantized(node, "MatMulNBits", bits, f"{bits}-bit weights, {kind} in blocks of {block}", activations)


def _activations(graph: Graph, x: object) -> str:
    """How the first operand comes."""
    if not is_onnx(x, "DequantizeLinear"):
        return "float activations"
    zero = codes_of(graph, x.args[2]) if len(x.args) > 2 else None
    return f"{'8-bit' if zero is None else _type_name(zero)} activations {_FIXED}"


def _weights(name: str, zeros: Any, per: str) -> str:
    """Codes around the middle of their range are symmetric."""
    if name.startswith("float"):
        return f"{name} weights, {per}"
    middle = 2 ** ((_bits(name) or 8) - 1) if name.startswith("uint") else 0
    symmetric = bool(np.all(np.asarray(0 if zeros is None else zeros) == middle))
    return f"{name} weights, {'symmetric' if symmetric else 'asymmetric'} {per}"


def _per(graph: Graph, scale: object, block: int) -> str:
    if block:
        return f"in blocks of {block}"
    return "per tensor" if np.size(_array(graph, scale)) == 1 else "per channel"


def _zeros(graph: Graph, zero: object) -> Any:
    found = _array(graph, zero)
    return None if found is None else np.asarray(found, dtype=np.int64)


def _array(graph: Graph, value: object) -> Any:
    found = codes_of(graph, value)
    if isinstance(found, torch.Tensor):
        return found.float().numpy() if found.dtype.is_floating_point else found.numpy()
    return found


def _type_name(codes: Any) -> str:
    return str(codes.dtype).removeprefix("torch.")


def _bits(name: str) -> int | None:
    found = re.search(r"\d+", name)
    return int(found.group()) if found else None
