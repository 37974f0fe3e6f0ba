"""Marks of sparse weights in an ONNX file: `fxopt.sparsity` in the metadata of the operator that has the weight."""

from __future__ import annotations

from onnx import NodeProto
from torch import fx

from fxopt.errors import InvalidModel, InvalidOption
from fxopt.ir.graph import Graph
from fxopt.ir.sparsity import Mark

KEY = "fxopt.sparsity"
IR_VERSION = 10  # the first whose nodes have metadata
_PRODUCTS = (
    "Conv", "ConvInteger", "DynamicQuantizeMatMul", "FusedLinearInt8", "Gemm", "MatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearConv", "QLinearMatMul", "SparseLinearInt8",
)  # fmt: skip


def has_marks(graph: Graph) -> bool:
    """Whether an operator of the graph has a mark."""
    return any("sparsity" in node.meta for node in graph.nodes)


def is_written(proto: NodeProto, node: fx.Node) -> bool:
    """Whether the message says what the node's mark does."""
    return _written(proto) == _wanted(proto, node)


def write(proto: NodeProto, node: fx.Node | None) -> None:
    """Give the message the node's mark, and no other one."""
    text = "" if node is None else _wanted(proto, node)
    kept = [entry for entry in proto.metadata_props if entry.key != KEY]
    if len(kept) < len(proto.metadata_props):
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
    if text:
        proto.metadata_props.add(key=KEY, value=text)


def read(proto: NodeProto) -> Mark | None:
    """The mark that the message holds.

    Raises:
        InvalidModel: the entry is not one.
    """
    text = _written(proto)
    try:
        return Mark.parse(text) if text else None
    except InvalidOption as error:
        raise InvalidModel(f"node {proto.name or proto.op_type!r}: metadata {KEY}: {error}") from error


def _wanted(proto: NodeProto, node: fx.Node) -> str:
    return str(node.meta["sparsity"]) if "sparsity" in node.meta and proto.op_type in _PRODUCTS else ""


def _written(proto: NodeProto) -> str:
    return next((entry.value for entry in proto.metadata_props if entry.key == KEY), "")
