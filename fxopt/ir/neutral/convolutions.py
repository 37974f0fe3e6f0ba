"""How convolutions are read."""

from __future__ import annotations

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral.readers import Arguments, Readers, argument, aten, key_of

readers = Readers()
reads = readers.reads

_PLAIN = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@reads("convolution", *_PLAIN, *_TRANSPOSED, aten.convolution.default)
def _torch_convolution(graph: Graph, node: fx.Node) -> Arguments | None:
    general = node.target is aten.convolution.default
    transposed = bool(argument(node, 6, "transposed")) if general else node.target in _TRANSPOSED
    groups = argument(node, 8 if general else 6, "groups", 1)
    return node.args[0], node.args[1], argument(node, 2, "bias"), groups, transposed


@reads("convolution", "Conv", "ConvTranspose")
def _onnx_convolution(graph: Graph, node: fx.Node) -> Arguments | None:
    transposed = key_of(node) == "ConvTranspose"
    return node.args[0], node.args[1], argument(node, 2, ""), node.kwargs.get("group", 1), transposed
