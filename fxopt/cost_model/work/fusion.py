"""What ONNX Runtime fuses, as far as it decides a price.

- An activation, a constant bias or a residual behind a convolution; a constant bias behind a matrix product.
- A constant factor behind a matrix product (FusedMatMul).
- Cast -> Mul -> Add behind MatMulInteger or ConvInteger (the scales of a dynamically quantised product).
- DequantizeLinear -> operator -> QuantizeLinear: the operator computes in integers, and the pair costs nothing.
- Add -> LayerNormalization: SkipLayerNormalization.

Source: the optimised models that ONNX Runtime 1.32 writes for such graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fxopt.cost_model.work.call import count, tensor_of
from fxopt.ir.onnx.op import OnnxOp

_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")
_INTEGER_PRODUCTS = ("MatMulInteger", "ConvInteger")
_LINEAR_IN_INTEGERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_FLOAT_RESULT_IS_FINE = ("MatMul", "Gemm")  # fused with a float result too
_IN_INTEGERS = (
    *_LINEAR_IN_INTEGERS,
    *("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Softmax", "GlobalAveragePool", "AveragePool", "MaxPool"),
    *("Relu", "Clip", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Resize", "Split", "Gather"),
)
_EIGHT_BITS = (torch.int8, torch.uint8)


def op_type(node: object) -> str:
    """The operator type of a node of the default or Microsoft domain, else ""."""
    return node.target.op_type if isinstance(node, fx.Node) and isinstance(node.target, OnnxOp) else ""


def absorbed(node: fx.Node) -> Sequence[fx.Node] | None:
    """The operands that a fused node still reads from memory; None when the node is not fused into a neighbour."""
    kind = op_type(node)
    if kind == "DequantizeLinear":
        return () if node.users and all(computes_in_integers(user) for user in node.users) else None
    if kind == "QuantizeLinear":
        return () if computes_in_integers(_before_activation(node.args[0])) else None
    if kind == "Mul" and any(_is_dynamic_scale(argument) for argument in node.args[:2]):
        return ()  # scale of the input times scales of the weight
    if kind in ("Add", "Sum") and any(skips_into(user) is node for user in node.users):
        return ()  # the normalisation reads and writes in its place
    for position, producer in enumerate(node.args):
        if not isinstance(producer, fx.Node) or len(producer.users) != 1:
            continue
        others = [other for index, other in enumerate(node.args) if index != position and isinstance(other, fx.Node)]
        if _fuses(kind, producer, others):
            return [other for other in others if other.op != "get_attr"]
    return None


def _fuses(kind: str, producer: fx.Node, others: Sequence[fx.Node]) -> bool:
    before = op_type(producer)
    constant = all(other.op == "get_attr" for other in others)
    if before in ("Conv", "FusedConv", "ConvTranspose"):
        return kind in _ACTIVATIONS or kind == "BatchNormalization" or (kind == "Add" and before != "ConvTranspose")
    if kind in _ACTIVATIONS and before == "Add" and _is_residual_of_conv(producer):
        return True
    if before == "MatMul" and kind in ("Mul", "Div"):
        return constant and all(count(tensor_of(other)) == 1 for other in others)
    if before in ("MatMul", "Gemm"):
        return (kind == "Add" and constant) or (kind in _ACTIVATIONS and before == "Gemm")
    if kind == "Cast":
        return before in _INTEGER_PRODUCTS
    scaled = before == "Cast" and op_type(producer.args[0]) in _INTEGER_PRODUCTS
    if kind == "Mul":
        return scaled
    return kind == "Add" and constant and before == "Mul" and _scales_product(producer)


def _is_residual_of_conv(node: fx.Node) -> bool:
    return any(op_type(used) == "Conv" and len(used.users) == 1 for used in node.all_input_nodes)


def _scales_product(node: fx.Node) -> bool:
    casts = [used for used in node.all_input_nodes if op_type(used) == "Cast"]
    return any(op_type(cast.args[0]) in _INTEGER_PRODUCTS for cast in casts)


def _is_dynamic_scale(argument: object) -> bool:
    """The scale (second result) of a DynamicQuantizeLinear."""
    if not isinstance(argument, fx.Node) or argument.target is not operator.getitem:
        return False
    return op_type(argument.args[0]) == "DynamicQuantizeLinear" and argument.args[1:] == (1,)


def _before_activation(value: object) -> object:
    """The convolution or product behind an activation or bias that is fused into it; else the value itself."""
    while op_type(value) in ("Relu", "Clip", "Add") and isinstance(value, fx.Node):
        inner = [
            used for used in value.all_input_nodes if op_type(used) in _LINEAR_IN_INTEGERS and len(used.users) == 1
        ]
        if not inner:
            return value
        value = inner[0]
    return value


def computes_in_integers(node: object) -> bool:
    """True for an operator between DequantizeLinear and QuantizeLinear that has an 8-bit kernel."""
    kind = op_type(node)
    if kind not in _IN_INTEGERS or not isinstance(node, fx.Node):
        return False
    data = [arg for arg in node.args if isinstance(arg, fx.Node)]
    data = data[: 2 if kind in (*_LINEAR_IN_INTEGERS, "Add", "Mul") else len(data) if kind == "Concat" else 1]
    if not data or not all(_is_dequantized(argument) for argument in data):
        return False
    if kind in _FLOAT_RESULT_IS_FINE:
        return True
    return bool(node.users) and all(_ends_in_quantize(user) for user in node.users)


def _ends_in_quantize(user: fx.Node) -> bool:
    if op_type(user) not in ("Relu", "Clip"):
        return op_type(user) == "QuantizeLinear"
    return bool(user.users) and all(op_type(behind) == "QuantizeLinear" for behind in user.users)


def gives_codes(node: fx.Node) -> bool:
    """True when what a node that computes in integers writes is 8-bit codes."""
    return bool(node.users) and all(_ends_in_quantize(user) for user in node.users)


def _is_dequantized(node: fx.Node) -> bool:
    if op_type(node) != "DequantizeLinear":
        return False
    codes = tensor_of(node.args[0])
    return codes is not None and codes.dtype in _EIGHT_BITS


def skips_into(node: object) -> fx.Node | None:
    """The addition of two computed values that ONNX Runtime fuses with this layer normalisation."""
    if op_type(node) != "LayerNormalization" or not isinstance(node, fx.Node):
        return None
    total = node.args[0]
    if op_type(total) != "Add" or not isinstance(total, fx.Node) or len(total.users) != 1:
        return None
    a, b = total.args[:2]
    same = tensor_of(a) is not None and count(tensor_of(a)) == count(tensor_of(b))
    if not same or not all(isinstance(value, fx.Node) and value.op != "get_attr" for value in (a, b)):
        return None
    return total
