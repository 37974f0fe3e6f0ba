"""The ONNX form of 8-bit embeddings: Gather of codes and of scales, Cast, Mul.

Of the forms of one operator less, GatherBlockQuantized takes two to three times as long, and DequantizeLinear before
the Gather converts the whole table at every run. DequantizeLinear behind the Gathers is a little faster, but takes one
axis of scales: indices of two axes would have to be flattened (benchmarks/embeddings.py).
"""

from __future__ import annotations

from onnx import TensorProto
from torch import fx

from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.embedding_w8 import embedding_w8


def _embedding(emitter: Emitter, node: fx.Node) -> str:
    codes, scales, indices = (emitter.value(argument) for argument in node.args)
    y = emitter.output(node)
    rows, levels, units = (emitter.fresh(f"{y}_{part}") for part in ("codes", "levels", "scales"))
    emitter.node("Gather", [codes, indices], [rows], axis=0)
    emitter.node("Cast", [rows], [levels], to=TensorProto.FLOAT)
    emitter.node("Gather", [scales, indices], [units], axis=0)
    emitter.node("Mul", [levels, units], [y])
    return y


EMBEDDING_FORMS: Forms = {embedding_w8.target: _embedding}
