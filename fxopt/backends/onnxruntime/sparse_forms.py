"""The ONNX form of linears whose zeros are not stored: the weight is decoded by constants alone.

ONNX Runtime folds that when it opens the model: a smaller file that runs as with dense weights, in any runtime of the
standard. Bits of the mask become numbers of stored blocks by a running sum; the block 0 is one of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from fxopt.ir.graph import Graph, tensor_value
from fxopt.ir.onnx.dtypes import FROM_TORCH
from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.linear_sparse import conv_sparse, linear_sparse


def _linear(emitter: Emitter, node: fx.Node) -> str:
    """Gemm of a matrix; of more axes, MatMul and Add."""
    x, bias = node.args[0], node.args[3]
    weight = _weight(emitter, node, "columns first")
    value = tensor_value(x)
    y = emitter.output(node)
    if value is not None and value.dim() == 2:
        emitter.node("Gemm", [emitter.value(x), weight, *([] if bias is None else [emitter.value(bias)])], [y])
        return y
    product = y if bias is None else emitter.fresh(f"{y}_product")
    emitter.node("MatMul", [emitter.value(x), weight], [product])
    if bias is not None:
        emitter.node("Add", [product, emitter.value(bias)], [y])
    return y


def _conv(emitter: Emitter, node: fx.Node) -> str:
    arguments: Any = node.args
    x, _, _, bias, _, _, stride, pads = arguments
    inputs = [emitter.value(x), _weight(emitter, node, "kernel"), *([] if bias is None else [emitter.value(bias)])]
    y = emitter.output(node)
    emitter.node("Conv", inputs, [y], strides=stride, pads=pads, kernel_shape=[1] * len(stride))
    return y


def _weight(emitter: Emitter, node: fx.Node, layout: str) -> str:
    """The name of the weight: [in, out], or [out, in, 1, ...] of a convolution."""
    arguments: Any = node.args
    x, values, mask, _, columns, *_ = arguments
    key = ("decoded", values, mask, layout)
    if key not in emitter.shared:
        rank = len(node.args[6]) if layout == "kernel" else 0  # type: ignore[arg-type]
        emitter.shared[key] = _Decoding(emitter, values, mask, columns).weight(rank, tensor_value(x))
    return str(emitter.shared[key])


class _Decoding:
    """The operators that make a weight of its stored parts."""

    def __init__(self, emitter: Emitter, values: fx.Node, mask: fx.Node, columns: int) -> None:
        found = [emitter.graph.constant(part) for part in (values, mask)]
        assert found[0] is not None and found[1] is not None
        self.emitter = emitter
        self.values, self.mask = found[0], found[1]
        self.columns = columns
        self.stem = str(values.target).removeprefix("k_")

    def step(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = self.emitter.fresh(f"{self.stem}_{op_type.lower()}")
        self.emitter.node(op_type, inputs, [name], **attributes)
        return name

    def constant(self, value: torch.Tensor, hint: str) -> str:
        return self.emitter.initializer(value, f"{self.stem}_{hint}")

    def reshaped(self, value: str, *sizes: int) -> str:
        return self.step("Reshape", [value, self.constant(torch.tensor(sizes), "shape")])

    def weight(self, rank: int, x: torch.Tensor | None) -> str:
        groups, outputs = len(self.mask), self.values.shape[1]
        blocks = torch.cat([self.values.new_zeros(1, outputs), self.values])
        table = self.constant(self.emitter.graph.stored(blocks), "values")
        found = self.step("Gather", [table, self.places()])
        found = self.reshaped(found, groups, self.columns, outputs)
        if rank:
            found = self.step("Transpose", [found], perm=[0, 2, 1])
            found = self.reshaped(found, groups * outputs, self.columns, *[1] * rank)
        else:
            found = self.step("Transpose", [found], perm=[1, 0, 2])
            found = self.reshaped(found, self.columns, groups * outputs)
        if x is not None and x.dtype != self.values.dtype:
            found = self.step("Cast", [found], to=FROM_TORCH[x.dtype])
        return found

    def places(self) -> str:
        """Of every block, in int32 [groups * in]: where it is stored, 0 for one of zeros."""
        shifts = self.constant(torch.arange(8, dtype=torch.uint8), "shifts")
        packed = self.constant(self.mask[..., None].contiguous(), "mask")
        bits = self.step("BitShift", [packed, shifts], direction="RIGHT")
        bits = self.step("Mod", [bits, self.constant(torch.tensor(2, dtype=torch.uint8), "two")])
        width = 8 * self.mask.shape[1]
        bits = self.reshaped(bits, len(self.mask), width)
        if width != self.columns:
            limits = {"start": 0, "end": self.columns, "axis": 1}
            bits = self.step("Slice", [bits, *(self.constant(torch.tensor([at]), name) for name, at in limits.items())])
        bits = self.reshaped(self.step("Cast", [bits], to=TensorProto.INT32), -1)
        first = self.constant(torch.tensor(0, dtype=torch.int64), "axis")
        return self.step("Mul", [self.step("CumSum", [bits, first]), bits])


def opening_bytes(graph: Graph) -> int:
    """Bytes that ONNX Runtime holds while it opens the file: it frees the steps of all decodings together, at the end.

    Of every weight one value of each step, with a number of 32 bits per block, and the bits three times as bytes.
    """
    total = 0
    for node in graph.calls():
        if node.target in SPARSE_FORMS:
            arguments: Any = node.args
            values, mask = (graph.constant(part) for part in arguments[1:3])
            assert values is not None and mask is not None
            blocks, outputs = len(mask) * arguments[4], values.shape[1]
            total += blocks * (_BITS + _NUMBERS * 4 + _FLOATS * outputs * values.element_size())
    return total


def opening_notes(opening: int) -> list[str]:
    """What the report says of these bytes: nothing below 1 GB."""
    if opening < 1e9:
        return []
    return [f"ONNX Runtime decodes sparse weights when it opens the file, which takes {opening / 1e9:.1f} GB meanwhile"]


_BITS, _NUMBERS, _FLOATS = 3, 4, 4  # steps of a decoding with one such value per block; of floats per weight
SPARSE_FORMS: Forms = {linear_sparse.target: _linear, conv_sparse.target: _conv}
