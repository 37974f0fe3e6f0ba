"""The work of ONNX operators, `com.microsoft` included, as ONNX Runtime executes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import fx

from fxopt.cost_model.work import products
from fxopt.cost_model.work.attention import ATTENTION
from fxopt.cost_model.work.call import Call, count, dtype_name, nbytes, tensor_of
from fxopt.cost_model.work.elementwise import NORMALISATION, SOFTMAX, per_element
from fxopt.cost_model.work.fusion import absorbed, computes_in_integers, gives_codes, op_type, skips_into
from fxopt.ir.onnx.lane import HostArray, has_symbol
from fxopt.ir.target import Cost, conv_kind

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size")  # a launch, no data
_GONE = ("Identity", "Dropout", "Constant")  # removed before the run
_MOVES = (  # write their result, and read as much
    *("Gather", "GatherElements", "GatherND", "Slice", "Expand", "Tile", "Pad", "Concat", "Split", "Transpose"),
    *("ScatterND", "ScatterElements", "Compress", "DepthToSpace", "SpaceToDepth", "ReverseSequence", "Trilu"),
    *("ConstantOfShape", "Range", "OneHot", "EyeLike", "Unique", "NonZero"),
)
_NORMALISATIONS = (
    *("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "GroupNormalization"),
    *("InstanceNormalization", "LpNormalization", "MeanVarianceNormalization", "GroupNorm"),
)
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "SkipGroupNorm")
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")


def onnx_cost(call: Call) -> Cost:
    """The work of one ONNX node; what ONNX Runtime folds or fuses costs (nearly) nothing."""
    name = op_type(call.node)
    kind = _KIND.get(name, "elementwise")
    value = call.node.meta.get("val")
    if name in _GONE or (_is_folded(call.node) and name != "DequantizeLinear"):
        return Cost(0.0, 0.0, call.dtype, "shape", 0)
    if isinstance(value, np.ndarray):
        return Cost(0.0, 0.0, "int64", "shape", int(_is_dynamic(call.node, value)))
    fused = absorbed(call.node)
    if fused is not None:
        flops = max(0.0, per_element(name) - 1) * count(call.output)  # what is cheap disappears in the producer
        return Cost(flops, sum(nbytes(used.meta.get("val")) for used in fused), call.dtype, "elementwise", 0)
    if call.output is None and not any(tensor_of(used) is not None for used in call.node.all_input_nodes):
        return Cost(0.0, 0.0, call.dtype, kind, 1)
    if name in _VIEWS:
        return Cost(0.0, 0.0, call.dtype, "shape", 1)
    if name in _CONTROL:
        return Cost(0.0, 0.0, call.dtype, "other", 1)
    rule = _RULES.get(name)
    return _elementwise(call) if rule is None else rule(call)


def _is_dynamic(node: fx.Node, value: HostArray) -> bool:
    """Whether shape arithmetic depends on dynamic dimensions; what does not is folded."""
    return has_symbol(value) or not np.array_equal(value, node.meta.get("probe", value))


def _is_folded(node: fx.Node) -> bool:
    """Computed from constants only."""
    used = node.all_input_nodes
    return bool(used) and all(argument.op == "get_attr" for argument in used)


# ---- products


def _linear(call: Call, a: int = 0, b: int = 1, turned: tuple[bool, bool] = (False, False)) -> Cost:
    first, second = call.shape(a), call.shape(b)
    if first is None or second is None:
        return call.cost(0.0, "linear")
    left = (*first[:-2], first[-1], first[-2]) if turned[0] and len(first) > 1 else first
    right = (*second[:-2], second[-1], second[-2]) if turned[1] and len(second) > 1 else second
    weight = call.argument(b)
    if op_type(weight) in ("DequantizeLinear", "Transpose", "Identity"):
        weight = weight.args[0]
    kind = "linear" if isinstance(weight, fx.Node) and weight.op == "get_attr" else "attention"
    return _floats_or_codes(call, products.matmul(left, right), kind)


def _floats_or_codes(call: Call, flops: float, kind: str) -> Cost:
    """A product in float, or between DequantizeLinear and QuantizeLinear."""
    if not computes_in_integers(call.node):
        return call.cost(flops, kind)
    operands = [used.args[0] if op_type(used) == "DequantizeLinear" else used for used in call.node.all_input_nodes]
    codes = [operand for operand in operands if isinstance(operand, fx.Node)]
    read = sum(nbytes(code.meta.get("val")) for code in codes)
    written = count(call.output) if gives_codes(call.node) else call.written
    pair = [tensor_of(code) for code in codes[:2]]
    dtype = products.integer_dtype(*pair) if len(pair) == 2 else "int8"
    return call.cost(flops, kind, dtype=dtype, moved=read + written)


def _turned(call: Call) -> tuple[bool, bool]:
    return bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))


def _gemm(call: Call) -> Cost:
    return _linear(call, turned=_turned(call))


def _qgemm(call: Call) -> Cost:
    return call.cost(_linear(call, 0, 3, _turned(call)).flops, "linear", dtype="int8")


def _matmul_integer(call: Call, a: int = 0, b: int = 1) -> Cost:
    flops = _linear(call, a, b).flops
    return call.cost(flops, "linear", dtype=products.integer_dtype(call.tensor(a), call.tensor(b)))


def _dynamic_quantize_matmul(call: Call) -> Cost:
    return call.cost(_linear(call).flops, "linear", dtype="int8", launches=2)


def _nbits(call: Call) -> Cost:
    rows = count(call.tensor(0)) // max(1, int(call.attribute("K", 1)))
    flops = 2.0 * rows * int(call.attribute("K", 0)) * int(call.attribute("N", 0))
    return call.cost(flops, "linear", dtype=call.dtype)  # computed at the rate of floats; fewer bytes


def _conv(call: Call, x: int = 0, w: int = 1, dtype: str = "") -> Cost:
    weight, output = call.shape(w), call.output
    if weight is None or output is None:
        return call.cost(0.0, "conv", dtype=dtype)
    flops = products.convolution([count(output)], weight)
    kind = conv_kind(weight)
    return call.cost(flops, kind, dtype=dtype) if dtype else _floats_or_codes(call, flops, kind)


def _qlinear_conv(call: Call) -> Cost:
    return _conv(call, 0, 3, products.integer_dtype(call.tensor(0), call.tensor(3)))


def _conv_integer(call: Call) -> Cost:
    return _conv(call, 0, 1, products.integer_dtype(call.tensor(0), call.tensor(1)))


def _conv_transpose(call: Call) -> Cost:
    x, weight = call.shape(0), call.shape(1)
    flops = 0.0 if x is None or weight is None else products.transposed_convolution(x, weight)
    return _floats_or_codes(call, flops, "conv")


def _einsum(call: Call) -> Cost:
    shapes = [call.shape(index) for index in range(len(call.node.args))]
    known = [shape for shape in shapes if shape is not None]
    flops = products.einsum(str(call.attribute("equation", "")), known) if len(known) == len(shapes) else 0.0
    return call.cost(flops, "attention" if len(shapes) > 1 else "shape")


def _recurrent(call: Call) -> Cost:
    """LSTM, GRU, RNN: per step, the input and recurrence weights [directions, gates * hidden, ...]."""
    x, w, r = call.shape(0), call.tensor(1), call.tensor(2)
    steps = x[0] * x[1] if x is not None and len(x) > 1 else 0
    return call.cost(2.0 * steps * (count(w) + count(r)), "linear")


# ---- the rest


def _elementwise(call: Call) -> Cost:
    name = op_type(call.node)
    operations = per_element(name)
    exponent = call.graph.constant(call.argument(1)) if name == "Pow" else None
    if exponent is not None and exponent.numel() == 1 and float(exponent.reshape(())) in (0.5, 2.0, 3.0):
        operations = 4.0
    if name in ("QuantizeLinear", "DequantizeLinear"):
        return call.cost((2.0 if name == "QuantizeLinear" else 1.0) * count(call.output), "quantize", dtype="float32")
    return _floats_or_codes(call, operations * count(call.output), "elementwise")


def _dynamic_quantize(call: Call) -> Cost:
    """Finds the range, then quantises."""
    return call.cost(3.0 * count(call.tensor(0)), "quantize")


def _move(call: Call) -> Cost:
    dtype = dtype_name(call.output) if call.output is not None else call.dtype
    return call.cost(0.0, "shape", dtype=dtype, moved=2 * call.written)


def _transpose(call: Call) -> Cost:
    """Copies of short pieces, or element by element where the last axis moves: 1.5 and 2.5 times a plain copy."""
    order = list(call.attribute("perm", []))
    strided = not order or order[-1] != len(order) - 1
    return call.cost(0.0, "shape", moved=(5 if strided else 3) * call.written)


def _norm(call: Call) -> Cost:
    skipped = skips_into(call.node)
    if skipped is None:
        return call.cost(NORMALISATION * count(call.tensor(0)), "norm")
    both = sum(nbytes(used.meta.get("val")) for used in skipped.all_input_nodes)
    return call.cost(NORMALISATION * count(call.tensor(0)), "norm.skip", moved=both + call.written)


def _skip_norm(call: Call) -> Cost:
    size = count(call.output)
    embeds = op_type(call.node) == "EmbedLayerNormalization"
    moved = 4.0 * nbytes(call.output) if embeds else call.moved
    return call.cost(NORMALISATION * size, "norm.skip", moved=moved, dtype="float32")


def _affine(call: Call) -> Cost:
    return call.cost(2.0 * count(call.output), "elementwise")


def _softmax(call: Call) -> Cost:
    return call.cost(SOFTMAX * count(call.output), "norm")


def _reduce(call: Call) -> Cost:
    return call.cost(float(count(call.tensor(0))), "norm")


def _pool(call: Call) -> Cost:
    """Takes as long as its input is large, whatever the window (as measured)."""
    return _floats_or_codes(call, float(max(count(call.tensor(0)), count(call.output))), "other")


def _search(call: Call) -> Cost:
    """TopK: a pass with comparisons over the input."""
    return call.cost(4.0 * count(call.tensor(0)), "other")


Rule = Callable[[Call], Cost]
_RULES: dict[str, Rule] = {
    "MatMul": _linear,
    "FusedMatMul": _gemm,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "MatMulInteger": _matmul_integer,
    "MatMulInteger16": _matmul_integer,
    "MatMulIntegerToFloat": _matmul_integer,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "QLinearMatMul": lambda call: _matmul_integer(call, 0, 3),
    "QGemm": _qgemm,
    "MatMulNBits": _nbits,
    "MatMulBnb4": _nbits,
    "Conv": _conv,
    "FusedConv": _conv,
    "QLinearConv": _qlinear_conv,
    "ConvInteger": _conv_integer,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **ATTENTION,
    **dict.fromkeys(_MOVES, _move),
    "Transpose": _transpose,
    **dict.fromkeys(_NORMALISATIONS, _norm),
    **dict.fromkeys(_SKIPS, _skip_norm),
    "BatchNormalization": _affine,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum"), _reduce),
    **{
        f"Reduce{which}": _reduce
        for which in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    },
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "QLinearAveragePool", "NhwcMaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "QLinearGlobalAveragePool", "LRN"), _pool),
    "TopK": _search,
    "DynamicQuantizeLinear": _dynamic_quantize,
}
_KIND = {
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "MatMulNBits"), "linear"),
    **dict.fromkeys(("Conv", "ConvTranspose", "QLinearConv", "ConvInteger"), "conv"),
    **dict.fromkeys(ATTENTION, "attention"),
    **dict.fromkeys((*_NORMALISATIONS, *_SKIPS, "Softmax"), "norm"),
    **dict.fromkeys((*_VIEWS, *_MOVES), "shape"),
}
