"""The ONNX form of linears whose zeros are not stored: the weight is decoded by constants alone.

ONNX Runtime folds that when it opens the model: a smaller file that runs as with dense weights, in any runtime of the
standard. It keeps what every step gives until all weights are decoded, so there are few steps. A table has, for each
byte of the mask, the numbers of its eight blocks among the stored ones of that byte; a running sum over bytes says how
many come before. The block 0 is one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from fxopt.ir.graph import Graph, tensor_value
from fxopt.ir.onnx.dtypes import FROM_TORCH
from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.linear_sparse import conv_sparse, linear_sparse
from fxopt.ir.packing import pack, unpack


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
        kept, values = unpack(self.mask, 1, self.columns).to(torch.bool), self.values
        if not rank:  # in the order of the weight [in, out]: by columns, then by groups
            number = (kept.reshape(-1).cumsum(0, dtype=torch.int32) - 1).reshape(kept.shape)
            kept = kept.T
            values = values[number.T[kept]]
        blocks = self.emitter.graph.stored(torch.cat([values.new_zeros(1, outputs), values]))
        found = self.step("Gather", [self.constant(blocks, "values"), self.places(kept.reshape(1, -1))])
        if rank and outputs > 1:
            found = self.step("Transpose", [self.reshaped(found, groups, self.columns, outputs)], perm=[0, 2, 1])
        sizes = [groups * outputs, self.columns, *[1] * rank] if rank else [self.columns, groups * outputs]
        found = self.reshaped(found, *sizes)
        if x is not None and x.dtype != self.values.dtype:
            found = self.step("Cast", [found], to=FROM_TORCH[x.dtype])
        return found

    def places(self, kept: torch.Tensor) -> str:
        """Of every block, in int32: where it is stored, 0 for one of zeros."""
        codes = self.constant(pack(kept.to(torch.uint8), 1)[0], "mask")
        codes = self.step("Cast", [codes], to=TensorProto.INT32)
        first, zero = self.shared(torch.tensor(0, dtype=torch.int64)), self.shared(torch.tensor(0, dtype=torch.int32))
        before = self.step("Gather", [self.shared(_COUNTS), codes])
        before = self.step("CumSum", [before, first], exclusive=1)
        within = self.step("Gather", [self.shared(_RANKS), codes])
        found = self.step("Max", [self.step("Add", [within, before]), zero])
        if kept.numel() % 8:
            limits = [self.shared(torch.tensor([at])) for at in (0, kept.numel(), 0)]
            found = self.step("Slice", [self.reshaped(found, -1), *limits])
        return found

    def shared(self, value: torch.Tensor) -> str:
        """A constant that all decodings share."""
        key = ("decoding", value.dtype, str(value.tolist()))
        if key not in self.emitter.shared:
            self.emitter.shared[key] = self.constant(value, "decoding")
        return str(self.emitter.shared[key])


def opening_bytes(graph: Graph) -> int:
    """Bytes that ONNX Runtime holds while it opens the file: it frees the steps of all decodings together, at the end.

    Of every block three numbers of 32 bits, of every eighth four, and two more where they do not fill the last byte of
    the mask; of every weight two floats, of a convolution with blocks of several outputs four.
    """
    total = 0
    for node, values, blocks in _packed(graph):
        outputs = values.shape[1]
        numbers = 3 + 4 / 8 + (2 if blocks % 8 else 0)
        floats = 4 if node.target is conv_sparse.target and outputs > 1 else 2
        total += blocks * round(numbers * 4 + floats * outputs * values.element_size())
    return total


def opening_notes(graph: Graph) -> list[str]:
    """What the report says of these bytes: nothing where they are few, or fewer than a model with dense weights has."""
    opening = opening_bytes(graph)
    dense = graph.size_bytes()
    for _, values, blocks in _packed(graph):
        dense += (blocks * values.shape[1] - values.numel()) * values.element_size()
    if opening < max(_FEW, dense):
        return []
    return [
        f"ONNX Runtime decodes sparse weights when it opens the file, which takes {_size(opening)} meanwhile; with "
        f"dense weights the model has {_size(dense)}"
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _packed(graph: Graph) -> Iterator[tuple[fx.Node, torch.Tensor, int]]:
    """The nodes whose weights are decoded, with their stored blocks, and how many blocks there are with the zeros."""
    for node in graph.calls():
        if node.target in SPARSE_FORMS:
            arguments: Any = node.args
            values, mask = (graph.constant(part) for part in arguments[1:3])
            assert values is not None and mask is not None
            yield node, values, len(mask) * arguments[4]


_FEW = 100_000_000  # bytes
_SET = torch.arange(256)[:, None] >> torch.arange(8) & 1  # of the 256 bytes of a mask their bits
_COUNTS = _SET.sum(1, keepdim=True).to(torch.int32)
_RANKS = torch.where(_SET == 1, _SET.cumsum(1), -(1 << 31)).to(torch.int32)  # below zero with whatever is added
SPARSE_FORMS: Forms = {linear_sparse.target: _linear, conv_sparse.target: _conv}
