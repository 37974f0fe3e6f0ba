"""Which axes of which values must be permuted together, so that a graph computes the same.

`y = linear(x, w)` ties the last axis of `y` to the first of `w` and the last of `x` to the last of `w`; a residual sum
ties its operands; and so on through element-wise operators, norms, transposes and reshapes. A group that meets an
operator which is not known here, an input, an output, or an axis with an order (space, concatenation) is *fixed*.
Shapes come from `meta["val"]` (`fxopt.ir.shapes.infer`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.op import OnnxOp

Axis = tuple[fx.Node, int]


@dataclass(frozen=True)
class TiedAxes:
    """Axes (value or constant, axis counted from 0) that share one permutation; `fixed` says why there is none."""

    axes: frozenset[Axis]
    fixed: str = ""


def tied_dimensions(graph: Graph) -> list[TiedAxes]:
    """The groups of a graph, each axis of each tensor in exactly one of them, in order of first appearance."""
    ties = _Ties(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            ties.fix_all(node, "it is an input")
        elif node.op == "get_attr" and graph.constant(node) is None:
            ties.fix_all(node, "torch has no element type for it")
        elif node.target is operator.getitem and node.args[0].op == "placeholder":  # type: ignore[union-attr]
            ties.fix_all(node, "it is part of an input")
        elif node.op == "call_function" and node.target is not operator.getitem:
            _tie(ties, node)
    for result in graph.result_nodes:
        ties.fix_all(result, "it is an output")
    for node in graph.nodes:
        ties.axes(node)
    return ties.groups()


class _Ties:
    """Union-find over axes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parent: dict[Axis, Axis] = {}
        self.reason: dict[Axis, str] = {}
        self.constants: dict[str, fx.Node] = {}  # two nodes of one constant are one value
        self.shapes: dict[fx.Node, tuple[Any, ...] | None] = {}
        self.touched: set[fx.Node] = set()  # by the handler that runs

    def shape(self, node: Any) -> tuple[Any, ...] | None:
        """Fixed sizes as numbers, dynamic ones as symbols or pairs; None for what is no tensor of known shape."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self.shapes:
            self.shapes[node] = self.shape_now(node)
        return self.shapes[node]

    def shape_now(self, node: fx.Node) -> tuple[Any, ...] | None:
        constant = self.graph.constant(node)
        if constant is not None:
            return tuple(constant.shape)
        shape = getattr(node.meta.get("val"), "shape", None)
        probe = getattr(node.meta.get("probe"), "shape", shape)
        if shape is None or probe is None or len(shape) != len(probe):
            return None
        return tuple(a if str(a) == str(b) else (a, b) for a, b in zip(shape, probe, strict=True))

    def known(self, node: fx.Node) -> bool:
        """Whether the value is a tensor of known shape, or a size."""
        sizes = (int, float, torch.SymInt, torch.SymFloat)
        return self.shape(node) is not None or isinstance(node.meta.get("val"), sizes)

    def axes(self, node: Any) -> list[Axis]:
        """The axes of a tensor; none for everything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            node = self.constants.setdefault(str(node.target), node)
        found = [(node, index) for index in range(len(self.shape(node) or ()))]
        for axis in found:
            self.parent.setdefault(axis, axis)
        return found

    def root(self, axis: Axis) -> Axis:
        while self.parent[axis] != axis:
            self.parent[axis] = self.parent[self.parent[axis]]
            axis = self.parent[axis]
        return axis

    def join(self, a: Any, i: int, b: Any, j: int) -> None:
        """One permutation for axis `i` of `a` and `j` of `b`; an axis of size 1 has none, different sizes fix both."""
        axes, others = self.axes(a), self.axes(b)
        if not axes or not others:
            return
        self.touched.update((axes[0][0], others[0][0]))
        sizes = (self.shape(a) or ())[i], (self.shape(b) or ())[j]
        if 1 in sizes:
            return
        if str(sizes[0]) != str(sizes[1]):
            self.fix(a, i, "sizes differ")
            self.fix(b, j, "sizes differ")
            return
        first, second = self.root(axes[i]), self.root(others[j])
        if first == second:
            return
        self.parent[second] = first
        reason = self.reason.pop(second, "")
        if reason:
            self.reason.setdefault(first, reason)

    def fix(self, node: Any, index: int, reason: str) -> None:
        axes = self.axes(node)
        if axes:
            self.touched.add(axes[0][0])
            self.reason.setdefault(self.root(axes[index]), f"{label(axes[0][0])}: {reason}")

    def fix_all(self, node: Any, reason: str, start: int = 0) -> None:
        for _, index in self.axes(node)[start:]:
            self.fix(node, index, reason)

    def align(self, values: Iterable[Any], out: Any, skip: int = 0) -> None:
        """Tie the axes of `values` to those of `out` from the right, the last `skip` left out (broadcasting)."""
        rank = len(self.axes(out))
        for value in values:
            for index in range(skip + 1, min(rank, len(self.axes(value))) + 1):
                self.join(value, -index, out, -index)

    def groups(self) -> list[TiedAxes]:
        members: dict[Axis, list[Axis]] = {}
        for axis in self.parent:
            members.setdefault(self.root(axis), []).append(axis)
        return [TiedAxes(frozenset(axes), self.reason.get(root, "")) for root, axes in members.items()]


# ---- operators: each handler ties inputs to `out`, the node of the (first) result

Handler = Callable[[_Ties, fx.Node, fx.Node], None]


def _tie(ties: _Ties, node: fx.Node) -> None:
    name = _name(node)
    if name in _SIZES:
        return
    results = [user for user in node.users if user.target is operator.getitem]
    first = next((user for user in results if user.args[1] == 0), node)
    ties.touched.clear()
    if name in _HANDLERS and ties.shape(first) is not None and all(map(ties.known, node.all_input_nodes)):
        _HANDLERS[name](ties, node, first)
    for value in (node, *results, *node.all_input_nodes):
        axes = ties.axes(value)
        if axes and axes[0][0] not in ties.touched:
            ties.fix_all(value, f"{node.target} does not say how its axes correspond")


def _name(node: fx.Node) -> str:
    """`add` for aten overloads, `Add` for operators of the ONNX domain, the full text for others."""
    target: Any = node.target
    if isinstance(target, OnnxOp) and target.domain == "":
        return target.op_type
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._schema.name).removeprefix("aten::")
    return str(target)


def _option(node: fx.Node, index: int, name: str, default: Any) -> Any:
    value = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
    return default if value is None else value


def _aligned(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    ties.align(node.all_input_nodes, out)


def _same(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    """The first input has the axes of the result, aligned from the right."""
    ties.align(node.args[:1], out)


def _linear(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    x, w, *bias = node.args
    ties.join(x, -1, w, 1)
    ties.join(w, 0, out, -1)
    ties.align(bias, out)
    ties.align([x], out, skip=1)


def _product(ties: _Ties, a: Any, b: Any, out: Any) -> None:
    left, right = len(ties.axes(a)), len(ties.axes(b))
    ties.join(a, -1, b, -2 if right > 1 else -1)
    if right > 1:
        ties.join(b, -1, out, -1)
    if left > 1:
        ties.join(a, -2, out, -2 if right > 1 else -1)
    for value, rank, other in ((a, left, right), (b, right, left)):
        for index in range(3, rank + 1):
            ties.join(value, -index, out, -index if other > 1 else 1 - index)


def _matmul(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    _product(ties, node.args[0], node.args[1], out)


def _addmm(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    _product(ties, node.args[1], node.args[2], out)
    ties.align([node.args[0]], out)


def _gemm(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    a, b, *c = node.args
    row, column = int(bool(node.kwargs.get("transA"))), int(bool(node.kwargs.get("transB")))
    ties.join(a, row, out, 0)
    ties.join(a, 1 - row, b, column)
    ties.join(b, 1 - column, out, 1)
    ties.align(c, out)


def _conv(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    x, w, *rest = node.args
    whole = _name(node) == "convolution"
    groups = node.kwargs.get("group", 1) if _name(node) == "Conv" else _option(node, 8 if whole else 6, "groups", 1)
    size: tuple[Any, ...] = ties.shape(w) or ()
    if len(ties.axes(x)) != len(ties.axes(w)):
        return  # without a batch axis
    ties.join(x, 0, out, 0)
    ties.join(w, 0, out, 1)
    ties.join(rest[0] if rest else None, 0, out, 1)
    for value in (x, w, out):
        ties.fix_all(value, "a convolution slides over it", start=2)
    if groups == 1:
        ties.join(x, 1, w, 1)
    elif groups == size[0] and size[1] == 1:
        ties.join(x, 1, out, 1)
    else:
        ties.fix_all(x, "a grouped convolution", start=1)
        ties.fix_all(w, "a grouped convolution")
    if whole and _option(node, 6, "transposed", False):
        ties.fix_all(x, "a transposed convolution")
        ties.fix_all(w, "a transposed convolution")
        ties.fix_all(out, "a transposed convolution")


def _channels(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    """Batch norm: vectors over axis 1."""
    x, *vectors = node.args
    ties.align([x], out)
    for vector in vectors:
        ties.join(vector, 0, out, 1)


def _pool(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    for index in range(min(2, len(ties.axes(out)))):
        ties.join(node.args[0], index, out, index)
    if any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users):
        ties.fix_all(out, "its indices count channels")
    for value in (node.args[0], out):
        ties.fix_all(value, "pooling slides over it", start=2)


def _permute(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    x: Any = node.args[0]
    rank = len(ties.axes(x))
    order = list(range(rank))[::-1]
    if _name(node) == "transpose":
        order = list(range(rank))
        first, second = _option(node, 1, "dim0", 0) % rank, _option(node, 2, "dim1", 0) % rank
        order[first], order[second] = second, first
    elif _name(node) != "t":
        order = list(_option(node, 1, "perm", order))
    for index, source in enumerate(order):
        ties.join(x, source, out, index)


def _reshape(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    """Axes at the same place in memory order with the same size are one; others are split or merged."""
    x: Any = node.args[0]
    before, after = ([(i, size) for i, size in enumerate(ties.shape(value) or ()) if size != 1] for value in (x, out))
    while before and after and str(before[-1][1]) == str(after[-1][1]):
        ties.join(x, before.pop()[0], out, after.pop()[0])
    while before and after:
        if str(before[0][1]) == str(after[0][1]):
            ties.join(x, before.pop(0)[0], out, after.pop(0)[0])
            continue
        products = [1, 1]
        while products[0] != products[1] or products[0] == 1:
            side = int(products[0] > products[1])
            taken = (before, after)[side]
            size = taken[0][1] if taken else None
            if not isinstance(size, int) or size == 0:  # a symbolic size: nothing is known behind it
                break
            ties.fix((x, out)[side], taken.pop(0)[0], f"{label(node)} splits or merges it")
            products[side] *= size
        if products[0] != products[1] or products[0] == 1:
            break
    for value, left in ((x, before), (out, after)):
        for index, _ in left:
            ties.fix(value, index, f"{label(node)} splits or merges it")


def _reduce(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    x: Any = node.args[0]
    rank = len(ties.axes(x))
    axes = _option(node, 1, "axes", node.kwargs.get("dim"))
    if node.kwargs.get("noop_with_empty_axes"):
        return
    constant = ties.graph.constant(axes)
    axes = constant.tolist() if constant is not None else axes
    if isinstance(axes, fx.Node):
        return  # computed
    listed = [axes] if isinstance(axes, int) else axes or range(rank)
    reduced = {index % rank for index in listed} if rank else set()
    kept = [index for index in range(rank) if index not in reduced]
    targets = kept if len(ties.axes(out)) == rank else range(len(kept))
    for index, target in zip(kept, targets, strict=True):
        ties.join(x, index, out, target)


def _along(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    """Concatenation, split and slice: the axis keeps its order, the others are tied."""
    dim: Any = _option(node, 2 if _name(node) in ("split", "chunk", "split_with_sizes") else 1, "dim", 0)
    dim = node.kwargs.get("axis", 0) if _name(node) in ("Concat", "Split") else dim
    results = [user for user in node.users if user.target is operator.getitem] or [out]
    rank = len(ties.axes(out))
    for value in (*node.all_input_nodes, *results):
        if len(ties.axes(value)) != rank:
            continue
        ties.fix(value, dim % rank, f"{label(node)} cuts along it")
        for index in set(range(rank)) - {dim % rank}:
            ties.join(value, index, out, index)


def _gather(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    x: Any = node.args[0]
    indices: Any = node.args[1]
    rank, inner = len(ties.axes(x)), len(ties.shape(indices) or ())
    axis = int(node.kwargs.get("axis", 0)) % rank  # type: ignore[arg-type]
    ties.fix(x, axis, f"{label(node)} looks up along it")
    for index in range(rank):
        if index != axis:
            ties.join(x, index, out, index if index < axis else index + inner - 1)
    for index in range(inner):
        ties.join(indices, index, out, axis + index)


def _attention(ties: _Ties, node: fx.Node, out: fx.Node) -> None:
    q, k, v, *rest = node.args
    ties.join(q, -1, k, -1)
    ties.join(v, -1, out, -1)
    ties.align([q, k, v], out, skip=2)
    for value in (q, k, v, out):
        ties.fix(value, -2, "positions have an order")
    for value in rest:
        ties.fix_all(value, "a mask over positions")


_SIZES = frozenset(["sym_size", "sym_numel", "Shape", "Size", "_assert_tensor_metadata", "_assert_scalar"])
_ATEN_ALIGNED = """
    relu gelu silu mish tanh sigmoid exp log neg abs sqrt rsqrt erf sin cos reciprocal pow clamp hardtanh hardswish
    hardsigmoid leaky_relu elu softplus square add sub mul div maximum minimum where eq ne lt le gt ge logical_and
    logical_or logical_not clone contiguous detach dropout alias _to_copy to lift_fresh_copy softmax _softmax
    log_softmax _log_softmax layer_norm native_layer_norm rms_norm masked_fill
"""
_ONNX_ALIGNED = """
    Relu Gelu Tanh Sigmoid Exp Log Neg Abs Sqrt Erf Sin Cos Reciprocal Pow Clip HardSwish HardSigmoid LeakyRelu Elu
    Softplus Mish Swish Add Sub Mul Div Max Min Where Equal Less Greater And Or Not Identity Cast Softmax LogSoftmax
    LayerNormalization RMSNormalization PRelu Floor Ceil Round Sign IsNaN
"""
_BY_HANDLER: list[tuple[Handler, str]] = [
    (_aligned, _ATEN_ALIGNED + _ONNX_ALIGNED),
    (_same, "expand Expand Dropout"),
    (_linear, "linear"),
    (_matmul, "mm bmm matmul MatMul"),
    (_addmm, "addmm"),
    (_gemm, "Gemm"),
    (_conv, "conv1d conv2d conv3d convolution Conv"),
    (_channels, "_native_batch_norm_legit_no_training batch_norm BatchNormalization"),
    (_pool, "max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d "
            "adaptive_avg_pool2d _adaptive_avg_pool2d MaxPool AveragePool GlobalAveragePool GlobalMaxPool"),
    (_permute, "permute transpose t Transpose"),
    (_reshape, "view reshape _unsafe_view flatten squeeze unsqueeze Reshape Flatten Squeeze Unsqueeze"),
    (_reduce, "mean sum amax amin ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2"),
    (_along, "cat split chunk split_with_sizes slice narrow Concat Split"),
    (_gather, "embedding Gather"),
    (_attention, "scaled_dot_product_attention"),
]  # fmt: skip
_HANDLERS = {name: handler for handler, names in _BY_HANDLER for name in names.split()}
