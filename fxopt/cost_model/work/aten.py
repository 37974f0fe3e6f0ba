"""The work of aten operators, with pointwise operators fused as `torch.compile` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.cost_model.work import products
from fxopt.cost_model.work.call import Call, count, dtype_name, nbytes, sizes, tensor_of, tensors
from fxopt.cost_model.work.elementwise import NORMALISATION, SOFTMAX, per_element
from fxopt.ir.target import Cost, conv_kind

_NOTHING = ("dropout", "detach", "alias", "lift_fresh_copy", "sym_size", "_assert_tensor_metadata", "_assert_scalar")
_MOVES = (
    *("cat", "stack", "clone", "copy", "index_select", "index", "gather", "embedding", "repeat", "repeat_interleave"),
    *("constant_pad_nd", "pad", "flip", "roll", "slice_scatter", "index_put", "scatter", "tril", "triu"),
    *("full", "zeros", "ones", "arange", "new_zeros", "new_full", "fill", "pixel_shuffle", "masked_fill"),
)
_NORMS = ("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "instance_norm")
_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "argmax", "argmin", "any", "all", "cumsum"),
)
_POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
)
_ATTENTION = (
    "scaled_dot_product_attention",
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"),
)


def aten_cost(call: Call) -> Cost:
    """The work of one aten node (or of any other function: by the sizes of its operands)."""
    name = _name(call.node.target)
    if name in _NOTHING or _is_view(call.node):
        return Cost(0.0, 0.0, call.dtype, "shape", 0)
    if call.output is None:
        return Cost(0.0, 0.0, call.dtype, "other", int(isinstance(call.node.target, torch._ops.OpOverload)))
    rule = _RULES.get(name)
    if rule is not None:
        return rule(call)
    return _pointwise(call) if _is_pointwise(call.node) else call.cost(float(count(call.output)), "other")


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(target, "__name__", target))


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target.is_view:
        return False
    before, after = tensor_of(node.args[0]) if node.args else None, tensor_of(node)
    return before is None or after is None or before.dtype == after.dtype  # `to` is a view that may convert


def _is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or _name(node.target) in ("to", "_to_copy")


def _pointwise(call: Call) -> Cost:
    """Elementwise; behind another one that nothing else uses, only the further operands are read."""
    name = _name(call.node.target)
    operations = per_element(name)
    if name == "pow" and call.argument(1) in (0.5, 2, 3):
        operations = 4.0
    flops = operations * count(call.output)
    before = [used for used in call.node.all_input_nodes if _fuses_forward(used) and len(used.users) == 1]
    if not before:
        return call.cost(flops, "elementwise")
    saved = nbytes(before[0].meta.get("val"))
    moved = max(0, call.moved - 2 * saved)  # the value in between is neither written nor read
    return call.cost(flops, "elementwise", moved=moved, launches=0)


def _fuses_forward(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return _is_pointwise(node) or _name(node.target) in (*_NORMS, "_softmax", "softmax")


def _matmul(call: Call, a: int = 0, b: int = 1) -> Cost:
    first, second = call.shape(a), call.shape(b)
    flops = 0.0 if first is None or second is None else products.matmul(first, second)
    weight = call.argument(b)
    while isinstance(weight, fx.Node) and _is_view(weight):
        weight = weight.args[0]
    constant = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return call.cost(flops, "linear" if constant else "attention", dtype=_dtype(call, a))


def _dtype(call: Call, index: int) -> str:
    tensor = call.tensor(index)
    return call.dtype if tensor is None else dtype_name(tensor)


def _linear(call: Call) -> Cost:
    x, weight = call.shape(0), call.shape(1)
    flops = 0.0 if x is None or weight is None else 2.0 * math.prod(x) * weight[0]
    return call.cost(flops, "linear", dtype=_dtype(call, 0))


def _convolution(call: Call) -> Cost:
    x, weight = call.shape(0), call.shape(1)
    if x is None or weight is None or call.output is None:
        return call.cost(0.0, "conv")
    transposed = "transpose" in _name(call.node.target) or call.argument(6, "transposed", False) is True
    if transposed:
        return call.cost(products.transposed_convolution(x, weight), "conv")
    return call.cost(products.convolution(sizes(call.output), weight), conv_kind(weight))


def _attention(call: Call) -> Cost:
    query, key, value = call.shape(0), call.shape(1), call.shape(2)
    if query is None or key is None or value is None:
        return call.cost(0.0, "attention")
    heads = math.prod(query[:-2])
    flops = products.attention(1, heads, query[-2], key[-2], query[-1], value[-1])
    return call.cost(flops, "attention", moved=call.read + nbytes(call.output))


def _einsum(call: Call) -> Cost:
    operands = list(tensors([used.meta.get("val") for used in call.node.all_input_nodes]))
    flops = products.einsum(str(call.argument(0)), [sizes(operand) for operand in operands])
    return call.cost(flops, "attention" if len(operands) > 1 else "shape")


def _recurrent(call: Call) -> Cost:
    """LSTM, GRU and RNN: every step multiplies with the input and recurrence weights of all layers and directions."""
    x = call.shape(0) or ()
    weights = [tensor for tensor in map(tensor_of, call.argument(2) or ()) if tensor is not None and tensor.dim() == 2]
    return call.cost(2.0 * math.prod(x[:-1]) * sum(map(count, weights)), "linear")


def _norm(call: Call) -> Cost:
    return call.cost(NORMALISATION * count(call.tensor(0)), "norm", moved=call.read + nbytes(call.output))


def _softmax(call: Call) -> Cost:
    return call.cost(SOFTMAX * count(call.output), "norm")


def _affine(call: Call) -> Cost:
    return call.cost(2.0 * count(call.output), "elementwise", moved=call.read + nbytes(call.output))


def _reduce(call: Call) -> Cost:
    return call.cost(float(count(call.tensor(0))), "norm")


def _move(call: Call) -> Cost:
    return call.cost(0.0, "shape", dtype=_dtype(call, 0), moved=2 * call.written)


def _pool(call: Call) -> Cost:
    return call.cost(float(max(count(call.tensor(0)), count(call.output))), "other")


Rule = Callable[[Call], Cost]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "_int_mm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), lambda call: _matmul(call, 1, 2)),
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(_ATTENTION, _attention),
    "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), _affine),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_POOLS, _pool),
}
