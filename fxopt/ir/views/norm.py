"""`Norm`: layer and root-mean-square normalisation, whole or spelled out, in both dialects."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.common import argument, aten, escapes, is_aten, is_onnx, scalar_constant, trailing_axes

Kind = Literal["layer", "rms"]


@dataclass(frozen=True)
class Norm:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last `axes` axes; "rms": without the means."""

    node: fx.Node
    x: fx.Node
    kind: Kind
    axes: int
    eps: float
    weight_node: fx.Node | None
    bias_node: fx.Node | None
    inner: tuple[fx.Node, ...] = ()

    def weight(self, graph: Graph) -> torch.Tensor | None:
        """The factor per element of the last axes, or None."""
        return graph.constant(self.weight_node)

    def bias(self, graph: Graph) -> torch.Tensor | None:
        """What is added per element of the last axes, or None."""
        return graph.constant(self.bias_node)


def norm(graph: Graph, node: fx.Node) -> Norm | Refusal | None:
    """The normalisation whose value `node` is; None when it is something else, a refusal when it is almost one."""
    if node.op != "call_function":
        return None
    found = _whole(node) or _spelled_out(graph, node)
    if not isinstance(found, Norm):
        return found
    outside = escapes(found.inner, node)
    if outside is not None:
        return Refusal("its inner value {} is also used by {}", outside[0].name, outside[1].name)
    for name, constant in (("weight", found.weight_node), ("bias", found.bias_node)):
        if constant is not None and graph.constant(constant) is None:
            return Refusal("the {} is computed at run time (by {}), not a constant", name, constant.name)
    return found


def norms(graph: Graph) -> Iterator[Norm | tuple[fx.Node, Refusal]]:
    """Every normalisation of the graph in execution order, and what is almost one with the reason."""
    swallowed: set[fx.Node] = set()
    found: list[Norm | tuple[fx.Node, Refusal]] = []
    for node in reversed(graph.fx.nodes):
        if node in swallowed:
            continue
        view = norm(graph, node)
        if isinstance(view, Norm):
            swallowed.update(view.inner)
            found.append(view)
        elif view is not None:
            found.append((node, view))
    yield from reversed(found)


# ---- one operator


def _whole(node: fx.Node) -> Norm | Refusal | None:
    source: Any = node
    inner: tuple[fx.Node, ...] = ()
    if node.target is operator.getitem:
        source = node.args[0]
        if node.args[1] != 0 or not _returns_statistics(source):
            return None
        inner = (source,)
    elif _returns_statistics(node):
        return None  # its first `getitem` is the value
    if is_onnx(source, "LayerNormalization"):
        return _onnx(node, source, "layer", inner)
    if is_onnx(source, "RMSNormalization", "SimplifiedLayerNormalization"):
        return _onnx(node, source, "rms", inner)
    if is_aten(source, aten.layer_norm.default, aten.native_layer_norm.default):
        eps = argument(source, 4, "eps", 1e-5)
        return _norm(node, source, "layer", len(source.args[1]), eps, (2, 3), inner)  # type: ignore[arg-type]
    if is_aten(source, aten.rms_norm.default, aten._fused_rms_norm.default):
        return _rms(node, source, inner)
    return None


def _returns_statistics(node: fx.Node) -> bool:
    if is_onnx(node, "LayerNormalization", "SimplifiedLayerNormalization"):
        return bool(node.kwargs.get("_outputs", 1) != 1)
    return is_aten(node, aten.native_layer_norm.default, aten._fused_rms_norm.default)


def _norm(
    node: fx.Node, source: fx.Node, kind: Kind, axes: int, eps: float, at: tuple[int, int], inner: tuple[fx.Node, ...]
) -> Norm:
    """`at`: the positions of weight and bias."""
    weight, bias = argument(source, at[0], "weight"), argument(source, at[1], "bias")
    x: Any = source.args[0]
    return Norm(node, x, kind, axes, float(eps), weight, None if kind == "rms" else bias, inner)


def _onnx(node: fx.Node, source: fx.Node, kind: Kind, inner: tuple[fx.Node, ...]) -> Norm | Refusal:
    axis: Any = source.kwargs.get("axis", -1)
    if axis >= 0:
        shape = shape_of(source.args[0])
        if shape is None:
            return Refusal("axis={} counts from the front and the rank of x is unknown", axis)
        axis -= len(shape)
    eps: Any = source.kwargs.get("epsilon", 1e-5)
    return _norm(node, source, kind, -axis, eps, (1, 2), inner)


def _rms(node: fx.Node, source: fx.Node, inner: tuple[fx.Node, ...]) -> Norm | Refusal:
    eps = argument(source, 3, "eps")
    if eps is None:
        x = source.args[0]
        value = x.meta.get("val") if isinstance(x, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            return Refusal("eps is left to the element type, which is unknown")
        eps = torch.finfo(value.dtype).eps
    return _norm(node, source, "rms", len(source.args[1]), eps, (2, 99), inner)  # type: ignore[arg-type]


# ---- spelled out


def _spelled_out(graph: Graph, node: fx.Node) -> Norm | None:
    """d / sqrt(mean(d * d) + eps), d being x or x - mean(x), then cast, multiplied and shifted by constants."""
    inner: list[fx.Node] = []
    core = node
    shifted, bias = _with_constant(graph, core, "add")
    if shifted is not None:
        inner.append(shifted)
        core = shifted
    scaled, weight = _with_constant(graph, core, "mul")
    if scaled is not None:
        inner.append(scaled)
        core = scaled
    elif bias is not None:
        return None
    narrowed = read(graph, core, "cast")
    if narrowed is not None and isinstance(narrowed[0], fx.Node):
        inner.append(narrowed[0])
        core = narrowed[0]
    for d, variance, between in _quotients(graph, core):
        found = _deviation(graph, d, variance)
        if found is None:
            continue
        axes, eps, nodes = found
        inner += [variance, *between, *nodes]
        x, kind, nodes = _centred(graph, d, axes, {node, core, *inner})
        inner += nodes
        if (kind == "rms" and bias is not None) or not (_fits(graph, weight, axes) and _fits(graph, bias, axes)):
            return None
        return Norm(node, x, kind, axes, eps, weight, bias, tuple(dict.fromkeys(inner)))
    return None


def _with_constant(graph: Graph, node: fx.Node, name: str) -> tuple[fx.Node | None, fx.Node | None]:
    """(the computed operand, the constant one) of an addition or product; (None, None) else."""
    given = read(graph, node, name)
    if given is None:
        return None, None
    for value, constant in (given, given[::-1]):
        if isinstance(value, fx.Node) and graph.constant(value) is None and graph.constant(constant) is not None:
            return value, constant
    return None, None


def _fits(graph: Graph, node: fx.Node | None, axes: int) -> bool:
    """True for a constant that differs at most along the last `axes` axes."""
    constant = graph.constant(node)
    return constant is None or all(size == 1 for size in constant.shape[: max(constant.dim() - axes, 0)])


def _quotients(graph: Graph, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """(d, s, nodes between) for every reading of the node as d / sqrt(s)."""
    product = read(graph, node, "mul")
    for d, inverse in (product, product[::-1]) if product is not None else ():
        found = _inverse_root(graph, inverse)
        if found is not None and isinstance(d, fx.Node):
            yield d, found[0], (inverse, *found[1])
    ratio = read(graph, node, "div")
    root = None if ratio is None else _root(graph, ratio[1])
    if ratio is not None and root is not None and isinstance(ratio[0], fx.Node):
        yield ratio[0], root, (ratio[1],)


def _inverse_root(graph: Graph, node: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(s, nodes between) when the node is 1 / sqrt(s)."""
    direct, power = read(graph, node, "rsqrt"), read(graph, node, "pow")
    if direct is not None:
        return direct[0], ()
    if power is not None:
        return (power[0], ()) if scalar_constant(graph, power[1]) == -0.5 else None
    inverted, ratio = read(graph, node, "reciprocal"), read(graph, node, "div")
    if ratio is not None and scalar_constant(graph, ratio[0]) == 1:
        inverted = ratio[1:]
    root = None if inverted is None else _root(graph, inverted[0])
    return None if root is None or inverted is None else (root, (inverted[0],))


def _root(graph: Graph, node: Any) -> fx.Node | None:
    """s when the node is sqrt(s)."""
    root, power = read(graph, node, "sqrt"), read(graph, node, "pow")
    if power is not None and scalar_constant(graph, power[1]) == 0.5:
        root = power
    return root[0] if root is not None and isinstance(root[0], fx.Node) else None


def _deviation(graph: Graph, d: fx.Node, node: fx.Node) -> tuple[int, float, tuple[fx.Node, ...]] | None:
    """(number of axes, eps, nodes between) when the node is mean(d * d) + eps over the last axes."""
    total = read(graph, node, "add")
    for mean, constant in (total, total[::-1]) if total is not None else ():
        eps, reduction = scalar_constant(graph, constant), read(graph, mean, "mean")
        if eps is None or reduction is None or not reduction[2]:
            continue
        square, axes, _ = reduction
        count = trailing_axes(square, axes)
        power, product = read(graph, square, "pow"), read(graph, square, "mul")
        squared = power is not None and power[0] is d and scalar_constant(graph, power[1]) == 2
        if count is not None and (squared or (product is not None and product[0] is d and product[1] is d)):
            return count, eps, (mean, square)
    return None


def _centred(graph: Graph, d: fx.Node, axes: int, owned: set[fx.Node]) -> tuple[fx.Node, Kind, tuple[fx.Node, ...]]:
    """(x, kind, nodes between): below `x - mean(x)` for layer norm, and below a cast that only the norm uses."""
    kind: Kind = "rms"
    between: tuple[fx.Node, ...] = ()
    difference = read(graph, d, "sub")
    mean = None if difference is None else read(graph, difference[1], "mean")
    if difference is not None and mean is not None and mean[0] is difference[0] and mean[2]:
        centred = trailing_axes(mean[0], mean[1]) == axes
        kind, between, d = ("layer", (d, difference[1]), difference[0]) if centred else (kind, between, d)
    widened = read(graph, d, "cast")
    if widened is not None and isinstance(widened[0], fx.Node) and set(d.users) <= owned | set(between):
        between, d = (*between, d), widened[0]
    return d, kind, between
