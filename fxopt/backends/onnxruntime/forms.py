"""The ONNX form of every fxopt operator: what ONNX Runtime runs in its integer kernels.

Linear: QuantizeLinear or DynamicQuantizeLinear, shared by all that take the value, and MatMulIntegerToFloat, which
multiplies by the scales and adds the bias. The standard's spellings (MatMulInteger -> Cast -> Mul -> Add; Q/DQ around
MatMul) are fused into it only partly: in models of fixed shapes ONNX Runtime makes float Gemms of them, at half the
speed of the float model. Convolution: Q/DQ around Conv becomes QLinearConv. Activations are uint8
and weights int8: the kernels for int8 activations are an order of magnitude slower on x86. Weights of few bits:
MatMulNBits, at accuracy level 4 where activations are rounded to 8 bits (its float kernels pay only for size).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.backends.onnxruntime.attention_forms import ATTENTION_FORMS
from fxopt.backends.onnxruntime.conv_forms import CONV_FORMS
from fxopt.backends.onnxruntime.embedding_forms import EMBEDDING_FORMS
from fxopt.backends.onnxruntime.fused_forms import FUSED_FORMS
from fxopt.backends.onnxruntime.sparse_forms import SPARSE_FORMS
from fxopt.ir.graph import shape_of
from fxopt.ir.onnx.export import Emitter, Form, Forms
from fxopt.ir.ops.concat_a8 import concat_a8
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from fxopt.ir.ops.elementwise_a8 import add_a8, mul_a8
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.ops.pool_a8 import average_pool_a8, global_average_pool_a8
from fxopt.ir.packing import pack, unpack


def _tensor(emitter: Emitter, node: Any) -> torch.Tensor:
    value = emitter.graph.constant(node)
    assert value is not None
    return value


def _name(node: Any) -> str:
    return str(node.target).removeprefix("k_")


def _shared(emitter: Emitter, key: tuple[Any, ...], value: torch.Tensor, hint: str) -> str:
    if key not in emitter.shared:
        emitter.shared[key] = emitter.initializer(value, hint)
    return str(emitter.shared[key])


def _transposed_codes(emitter: Emitter, codes: Any) -> str:
    """The codes as [in, out]: the layout of MatMul."""
    return _shared(emitter, ("transposed", codes), _tensor(emitter, codes).t().contiguous(), _name(codes))


def _linear_dynamic(emitter: Emitter, node: fx.Node) -> str:
    x_name = emitter.value(node.args[0])
    key = ("dynamic", x_name)
    if key not in emitter.shared:
        parts = [emitter.fresh(f"{x_name}_{part}") for part in ("quantized", "scale", "zero_point")]
        emitter.node("DynamicQuantizeLinear", [x_name], parts)
        emitter.shared[key] = parts
    return _product(emitter, node, *emitter.shared[key])


def _product(emitter: Emitter, node: fx.Node, quantized: str, scale: str, zero: str) -> str:
    """MatMulIntegerToFloat of the quantised input with the codes: one operator with the scales and the bias."""
    _, codes, scales, bias = node.args[:4]
    inputs = [quantized, _transposed_codes(emitter, codes), scale, emitter.value(scales), zero]
    if bias is not None:
        inputs += ["", emitter.value(bias)]
    y = emitter.output(node)
    emitter.node("MatMulIntegerToFloat", inputs, [y], domain="com.microsoft")
    return y


def _range(emitter: Emitter, scale: float, zero: int, stem: str) -> tuple[str, str]:
    """Names of the scale and the uint8 zero point; equal ones are shared."""
    return (
        _shared(emitter, ("scale", scale), torch.tensor(scale, dtype=torch.float32), f"{stem}_scale"),
        _shared(emitter, ("zero", zero), torch.tensor(zero, dtype=torch.uint8), f"zero_point_{zero}"),
    )


def _requantized(emitter: Emitter, x: str, scale: float, zero: int) -> str:
    """x rounded to the 256 levels, as float: one Q/DQ pair per value, shared by its consumers."""
    key = ("levels", x, scale, zero)
    if key not in emitter.shared:
        scale_name, zero_name = _range(emitter, scale, zero, x)
        quantized, levels = emitter.fresh(f"{x}_quantized"), emitter.fresh(f"{x}_dequantized")
        emitter.node("QuantizeLinear", [x, scale_name, zero_name], [quantized])
        emitter.node("DequantizeLinear", [quantized, scale_name, zero_name], [levels])
        emitter.shared[key] = levels
    return str(emitter.shared[key])


def _weight(emitter: Emitter, codes_name: str, scales: Any, axis: int) -> str:
    name = emitter.fresh(f"{codes_name}_dequantized")
    zero = _shared(
        emitter,
        ("weight zero", scales),
        torch.zeros_like(_tensor(emitter, scales), dtype=torch.int8),
        f"{codes_name}_zero",
    )
    emitter.node("DequantizeLinear", [codes_name, emitter.value(scales), zero], [name], axis=axis)
    return name


def _linear_static(emitter: Emitter, node: fx.Node) -> str:
    x, x_scale, x_zero = node.args[0], *node.args[4:]
    if _beside_convolutions(emitter, x):
        return _linear_standard(emitter, node)
    x_name = emitter.value(x)
    scale, zero = _range(emitter, x_scale, x_zero, x_name)  # type: ignore[arg-type]
    key = ("quantized", x_name, x_scale, x_zero)
    if key not in emitter.shared:
        emitter.shared[key] = emitter.fresh(f"{x_name}_quantized")
        emitter.node("QuantizeLinear", [x_name, scale, zero], [emitter.shared[key]])
    return _product(emitter, node, emitter.shared[key], scale, zero)


def _beside_convolutions(emitter: Emitter, x: Any) -> bool:
    """The linear behind a network of 8-bit convolutions: in the standard's form other runtimes take the file whole.

    With an operator of ONNX Runtime in it, OpenVINO's provider computes all convolutions in floats.
    """
    if "has 8-bit convolutions" not in emitter.shared:
        emitter.shared["has 8-bit convolutions"] = any(
            node.target is conv_w8a8.target for node in emitter.graph.calls()
        )
    shape = shape_of(x)
    return bool(emitter.shared["has 8-bit convolutions"]) and shape is not None and len(shape) == 2


def _linear_standard(emitter: Emitter, node: fx.Node) -> str:
    """Q/DQ around MatMul, and a sum: MatMul and Add of matrices would become a float Gemm first."""
    x, codes, scales, bias, x_scale, x_zero = node.args
    levels = _requantized(emitter, emitter.value(x), x_scale, x_zero)  # type: ignore[arg-type]
    weight = _weight(emitter, _transposed_codes(emitter, codes), scales, axis=1)
    y = emitter.output(node)
    product = y if bias is None else emitter.fresh(f"{y}_product")
    emitter.node("MatMul", [levels, weight], [product])
    if bias is not None:
        emitter.node("Sum", [product, emitter.value(bias)], [y])
    return y


def _conv(emitter: Emitter, node: fx.Node) -> str:
    x, codes, scales, bias, x_scale, x_zero, y_scale, y_zero, stride, pads, dilation, groups = node.args
    levels = _requantized(emitter, emitter.value(x), x_scale, x_zero)  # type: ignore[arg-type]
    weight = _weight(emitter, emitter.value(codes), scales, axis=0)
    inputs = [levels, weight]
    if bias is not None:
        inputs.append(_conv_bias(emitter, node))
    y = emitter.output(node)
    plain = emitter.fresh(f"{y}_conv")
    attributes: dict[str, Any] = {
        "strides": stride, "pads": pads, "dilations": dilation, "group": groups,
        "kernel_shape": list(_tensor(emitter, codes).shape[2:]),
    }  # fmt: skip
    emitter.node("Conv", inputs, [plain], **attributes)
    return _on_levels(emitter, y, plain, y_scale, y_zero)


def _on_levels(emitter: Emitter, y: str, plain: str, scale: Any, zero: Any) -> str:
    """Q/DQ behind the value `plain`; the result `y` is on these levels, so takers with the same ones add no pair."""
    quantized = emitter.fresh(f"{y}_quantized")
    scale_name, zero_name = _range(emitter, scale, zero, y)
    emitter.node("QuantizeLinear", [plain, scale_name, zero_name], [quantized])
    emitter.node("DequantizeLinear", [quantized, scale_name, zero_name], [y])
    emitter.shared["levels", y, scale, zero] = y
    return y


def _elementwise(op_type: str) -> Form:
    """Q/DQ around an element-wise operator: QLinearAdd, QLinearMul."""

    def form(emitter: Emitter, node: fx.Node) -> str:
        arguments: Any = node.args
        x, other, x_scale, x_zero, other_scale, other_zero, y_scale, y_zero = arguments
        operands = [
            _requantized(emitter, emitter.value(x), x_scale, x_zero),
            _requantized(emitter, emitter.value(other), other_scale, other_zero),
        ]
        y = emitter.output(node)
        plain = emitter.fresh(f"{y}_{op_type.lower()}")
        emitter.node(op_type, operands, [plain])
        return _on_levels(emitter, y, plain, y_scale, y_zero)

    return form


def _concat(emitter: Emitter, node: fx.Node) -> str:
    """Q/DQ around Concat: QLinearConcat."""
    arguments: Any = node.args
    xs, scales, zeros, axis, y_scale, y_zero = arguments
    operands = [
        _requantized(emitter, emitter.value(x), scale, zero) for x, scale, zero in zip(xs, scales, zeros, strict=True)
    ]
    y = emitter.output(node)
    plain = emitter.fresh(f"{y}_concat")
    emitter.node("Concat", operands, [plain], axis=axis)
    return _on_levels(emitter, y, plain, y_scale, y_zero)


def _global_average_pool(emitter: Emitter, node: fx.Node) -> str:
    """Q/DQ around GlobalAveragePool: QLinearGlobalAveragePool."""
    arguments: Any = node.args
    x, keepdim, x_scale, x_zero, y_scale, y_zero = arguments
    levels = _requantized(emitter, emitter.value(x), x_scale, x_zero)
    y = emitter.output(node)
    pooled = emitter.fresh(f"{y}_pooled")
    emitter.node("GlobalAveragePool", [levels], [pooled])
    if keepdim:
        return _on_levels(emitter, y, pooled, y_scale, y_zero)
    kept = _on_levels(emitter, emitter.fresh(f"{y}_kept"), pooled, y_scale, y_zero)
    emitter.node("Flatten", [kept], [y], axis=1)
    return y


def _average_pool(emitter: Emitter, node: fx.Node) -> str:
    """Q/DQ around AveragePool: QLinearAveragePool."""
    arguments: Any = node.args
    x, kernel, stride, pads, include_pad, x_scale, x_zero, y_scale, y_zero = arguments
    levels = _requantized(emitter, emitter.value(x), x_scale, x_zero)
    y = emitter.output(node)
    pooled = emitter.fresh(f"{y}_pooled")
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads}
    emitter.node("AveragePool", [levels], [pooled], count_include_pad=int(include_pad), **attributes)
    return _on_levels(emitter, y, pooled, y_scale, y_zero)


def _conv_bias(emitter: Emitter, node: fx.Node) -> str:
    """The bias as int32 multiples of x_scale * scales, dequantised: ONNX Runtime folds it into QLinearConv."""
    codes, scales, bias, x_scale = node.args[1:5]
    unit = _tensor(emitter, scales) * float(x_scale)  # type: ignore[arg-type]
    levels = torch.round(_tensor(emitter, bias).double() / unit.double()).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    stem = _name(codes)
    names = [emitter.initializer(levels, f"{stem}_bias_int32"), emitter.initializer(unit, f"{stem}_bias_scale")]
    zero = emitter.initializer(torch.zeros_like(levels), f"{stem}_bias_zero")
    dequantized = emitter.fresh(f"{stem}_bias")
    emitter.node("DequantizeLinear", [*names, zero], [dequantized], axis=0)
    return dequantized


def _linear_nbits(emitter: Emitter, node: fx.Node) -> str:
    """MatMulNBits: blocks along the inputs, codes of 2, 4 or 8 bits; 3-bit codes lie in 4 bits."""
    arguments: Any = node.args
    x, packed, scales, _, bias, columns, bits, group, activation_bits = arguments
    out = _tensor(emitter, packed).shape[0]
    width = 4 if bits == 3 else bits
    key = ("blocks", packed)
    if key not in emitter.shared:
        emitter.shared[key] = emitter.initializer(
            _blocks(_tensor(emitter, packed), columns, bits, width, group), _name(packed)
        )
    inputs = [emitter.value(x), str(emitter.shared[key]), emitter.value(scales)]
    zero_points = _zero_points(emitter, node, width)
    if zero_points or bias is not None:
        inputs.append(zero_points)
    if bias is not None:
        inputs += ["", emitter.value(bias)]
    y = emitter.output(node)
    attributes: dict[str, Any] = {"K": columns, "N": out, "bits": width, "block_size": group}
    attributes["accuracy_level"] = 4 if activation_bits == 8 else 0
    emitter.node("MatMulNBits", inputs, [y], domain="com.microsoft", **attributes)
    return y


def _blocks(packed: torch.Tensor, columns: int, bits: int, width: int, group: int) -> torch.Tensor:
    """The codes as [out, blocks, bytes of a block]; no copy where blocks are whole bytes and the last one is full."""
    blocks = -(-columns // group)
    if bits == width and columns == blocks * group and group * bits % 8 == 0:
        return packed.reshape(packed.shape[0], blocks, -1)
    padded = torch.nn.functional.pad(unpack(packed, bits, columns), (0, blocks * group - columns))
    return pack(padded, width).reshape(packed.shape[0], blocks, -1)


def _zero_points(emitter: Emitter, node: fx.Node, width: int) -> str:
    """The name of the packed zero points; "" where they are those that the operator takes anyway."""
    arguments: Any = node.args
    scales, zeros, bits = arguments[2], arguments[3], arguments[6]
    if zeros is None and bits == width:
        return ""
    codes = torch.full_like(_tensor(emitter, scales), 1 << (bits - 1)) if zeros is None else _tensor(emitter, zeros)
    key = ("zero points", scales, zeros)
    return _shared(emitter, key, pack(codes.to(torch.uint8), width), f"{_name(node.args[1])}_zero_points")


FORMS: Forms = {
    **FUSED_FORMS,
    linear_w8a8_dynamic.target: _linear_dynamic,
    linear_w8a8.target: _linear_static,
    conv_w8a8.target: _conv,
    linear_nbits.target: _linear_nbits,
    add_a8.target: _elementwise("Add"),
    mul_a8.target: _elementwise("Mul"),
    concat_a8.target: _concat,
    global_average_pool_a8.target: _global_average_pool,
    average_pool_a8.target: _average_pool,
    **ATTENTION_FORMS,
    **CONV_FORMS,
    **EMBEDDING_FORMS,
    **SPARSE_FORMS,
}
