"""The ONNX form of convolutions with weights of few bits: the float weight is computed from codes, by constants alone.

ONNX Runtime folds that when it opens the model, so that it runs what it runs for float weights. DequantizeLinear would
say the same in one operator, but is not folded: it converts the weight at every call, and int4 takes four times as long
as the convolution itself.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from fxopt.ir.graph import tensor_value
from fxopt.ir.onnx.dtypes import FROM_TORCH
from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.conv_nbits import conv_nbits
from fxopt.ir.packing import pack, unpack


def _conv_nbits(emitter: Emitter, node: fx.Node) -> str:
    arguments: Any = node.args
    x, packed, _, _, bias, inner, _, _, stride, pads, dilation, groups = arguments
    key = ("float weight", packed)
    if key not in emitter.shared:
        emitter.shared[key] = _weight(emitter, node)
    inputs = [emitter.value(x), str(emitter.shared[key])]
    if bias is not None:
        inputs.append(emitter.value(bias))
    y = emitter.output(node)
    attributes: dict[str, Any] = {"strides": stride, "pads": pads, "dilations": dilation, "group": groups}
    emitter.node("Conv", inputs, [y], kernel_shape=inner[1:], **attributes)
    return y


def _weight(emitter: Emitter, node: fx.Node) -> str:
    """The name of the float weight; 3-bit codes lie in 4 bits, and rows are padded to whole groups."""
    arguments: Any = node.args
    x, packed, scales, zeros, _, inner, bits, group, *_ = arguments
    codes, factors = emitter.graph.constant(packed), emitter.graph.constant(scales)
    assert codes is not None and factors is not None
    (out, count), columns = factors.shape, 1
    for size in inner:
        columns *= size
    width = 4 if bits == 3 else bits
    padded = torch.nn.functional.pad(unpack(codes, bits, columns), (0, count * group - columns))
    stem = str(packed.target).removeprefix("k_")

    def step(op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = emitter.fresh(f"{stem}_{op_type.lower()}")
        emitter.node(op_type, inputs, [name], **attributes)
        return name

    def constant(value: torch.Tensor, hint: str) -> str:
        return emitter.initializer(value, f"{stem}_{hint}")

    stored = pack(padded, width)
    found = constant(stored if width == 8 else stored[..., None], "packed")
    if width < 8:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8)
        found = step("BitShift", [found, constant(shifts, "shifts")], direction="RIGHT")
        found = step("Mod", [found, constant(torch.tensor(1 << width, dtype=torch.uint8), "levels")])
    found = step("Cast", [found], to=TensorProto.FLOAT)
    if stored.shape[1] * 8 // width != count * group:  # whole bytes: the last one has codes of nothing
        whole = constant(torch.tensor([out, -1]), "rows")
        found = step("Reshape", [found, whole])
        found = _cut(step, constant, found, count * group)
    found = step("Reshape", [found, constant(torch.tensor([out, count, group]), "groups")])
    zero = emitter.graph.constant(zeros)
    middle = torch.tensor(float(1 << (bits - 1))) if zero is None else zero.float()[..., None]
    found = step("Sub", [found, constant(middle, "zeros")])
    found = step("Mul", [found, constant(factors.float()[..., None].contiguous(), "scales")])
    if columns != count * group:
        found = step("Reshape", [found, constant(torch.tensor([out, count * group]), "padded")])
        found = _cut(step, constant, found, columns)
    found = step("Reshape", [found, constant(torch.tensor([out, *inner]), "shape")])
    value = tensor_value(x)
    if value is not None and value.dtype != torch.float32:
        found = step("Cast", [found], to=FROM_TORCH[value.dtype])
    return found


def _cut(step: Any, constant: Any, rows: str, columns: int) -> str:
    """The first columns of a matrix."""
    limits = [constant(torch.tensor([value]), name) for value, name in ((0, "start"), (columns, "end"), (1, "axis"))]
    result: str = step("Slice", [rows, *limits])
    return result


CONV_FORMS: Forms = {conv_nbits.target: _conv_nbits}
