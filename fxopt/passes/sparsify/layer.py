"""`Layer`: what can be made sparse, a linear or a convolution with a kernel of one position, always as [out, in]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph, hint, label, provenance, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.common import aten, is_aten, is_onnx
from fxopt.ir.views.conv import Conv, conv, convs
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes.quantize_linear.patches import patches

_PASSED_ON = ("softmax", "sigmoid", "reshape", "squeeze", "unsqueeze", "transpose", "cast", "identity")


@dataclass(frozen=True)
class Layer:
    """y = x @ weight.T + bias at every position."""

    view: Linear | Conv

    @property
    def node(self) -> fx.Node:
        """Its value is the result."""
        return self.view.node

    @property
    def x(self) -> fx.Node:
        """The input: [..., in], or [N, in, *spatial] of a convolution."""
        return self.view.x

    @property
    def is_conv(self) -> bool:
        """Whether positions are those of a convolution."""
        return isinstance(self.view, Conv)

    def weight(self, graph: Graph) -> Tensor:
        """The weight [out, in]."""
        return self.view.weight(graph).flatten(1)

    def positions(self) -> int:
        """How many rows of inputs the weight is multiplied with, at the sizes for which costs are computed."""
        shape = shape_of(self.node)
        assert shape is not None
        sizes = [hint(dim) for dim in shape]
        return math.prod(sizes[:1] + sizes[2:]) if self.is_conv else math.prod(sizes[:-1])

    def rows(self, x: Tensor) -> Tensor:
        """The rows [n, in] of a value of the input."""
        if isinstance(self.view, Conv):
            return patches(x, self.view, (1,) * (x.dim() - 2))[0]
        return x.reshape(-1, x.shape[-1])

    def replace_weight(self, graph: Graph, weight: Tensor, made_by: str) -> None:
        """Give it another weight [out, in], stored as the old one was."""
        old = self.view.weight_node
        stored = graph.constant(old)
        assert stored is not None
        value = weight.to(stored.dtype)
        if isinstance(self.view, Linear) and self.view.transposed:
            value = value.t()
        (user,) = old.users
        name = label(old)
        source = (*provenance(old), made_by)
        new = constant_before(graph, user, value.reshape(stored.shape).contiguous(), name, source)
        if "onnx" in old.meta:
            new.meta["onnx"] = old.meta["onnx"].handed_over()
        user.replace_input_with(old, new)
        graph.erase(old)
        self.node.meta["provenance"] = (*provenance(self.node), made_by)


def layers(graph: Graph) -> Iterator[Layer | tuple[fx.Node, Refusal]]:
    """Every layer, and every other linear or convolution with the reason."""
    for found in linears(graph):
        yield found if isinstance(found, tuple) else Layer(found)
    for view in convs(graph):
        if isinstance(view, tuple):
            yield view
            continue
        kernel = tuple(view.weight(graph).shape[2:])
        if math.prod(kernel) == 1 and view.groups == 1:
            yield Layer(view)
        else:
            shown = "x".join(map(str, kernel)) + (f" in {view.groups} groups" if view.groups > 1 else "")
            yield view.node, Refusal("its kernel is {}; zeros are for linears and 1x1 convolutions of one group", shown)


def layer_of(graph: Graph, name: str) -> Layer:
    """The layer whose value the node of this fx name is."""
    node = graph.find(name)
    view = None if node is None else linear(graph, node) or conv(graph, node)
    assert isinstance(view, (Linear, Conv)), f"{name} is neither a linear nor a convolution of the graph"
    return Layer(view)


def sharers(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """What uses the data of each constant, also under another name or as a part of it."""
    spans = []
    for index, node in enumerate(graph.fx.find_nodes(op="get_attr")):
        value = graph.constant(node)
        if value is not None and value.numel():  # weights of one memory-mapped file share its storage, but no data
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            begin = value.data_ptr()
            spans.append((begin, begin + (last + 1) * value.element_size(), index, node))
    groups: list[list[fx.Node]] = []
    most = -1
    for begin, end, _, node in sorted(spans):
        if begin >= most:
            groups.append([])
        groups[-1].append(node)
        most = max(most, end)
    return {node: [user for each in nodes for user in each.users] for nodes in groups for node in nodes}


def is_head(graph: Graph, layer: Layer) -> bool:
    """Whether the value is an output of the model, as it is, as probabilities, or in another shape."""
    results = set(graph.result_nodes)
    pending, seen = [layer.node], set()
    while pending:
        node = pending.pop()
        if node in results:
            return True
        seen.add(node)
        pending += [user for user in node.users if user not in seen and _passes_on(graph, user, node)]
    return False


def _passes_on(graph: Graph, user: fx.Node, value: fx.Node) -> bool:
    if is_onnx(user, "LogSoftmax", "ArgMax") or is_aten(user, aten.log_softmax.int, aten.argmax.default):
        return True
    found = (read(graph, user, name) for name in _PASSED_ON)
    return any(arguments is not None and arguments[0] is value for arguments in found)
