"""`Builder`: makes the nodes that replace others, in the dialect of the graph; what each method makes `neutral` reads.

Values are nodes; a Python number is accepted where one operand of an element-wise operator may be a scalar. In ONNX
graphs a number becomes a constant of the other operand's element type, a shape an int64 constant, an element type its
TensorProto code, and the operator has the version that the model's opset asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx
import torch
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, label, provenance, tensor_value
from fxopt.ir.onnx.dtypes import FROM_TORCH
from fxopt.ir.onnx.op import OnnxOp

aten = torch.ops.aten
Operand = fx.Node | float
_BROADCASTS = 7  # the opset since which ONNX's element-wise operators broadcast like numpy


class Builder:
    """Makes nodes before the node `before`; they keep the provenance of `like` (default `before`) plus the makers.

    Args:
        made_by: the pass that makes them; `rule` is the rule of that pass.

    Raises:
        Unsupported: the model's opset has no form of an operator, or an element type that is needed is unknown.
    """

    def __init__(
        self, graph: Graph, before: fx.Node, made_by: str, like: fx.Node | None = None, rule: str = ""
    ) -> None:
        self.graph = graph
        self.before = before
        self.like = before if like is None else like
        self.makers = tuple(name for name in (rule, made_by) if name)
        self.made: list[fx.Node] = []
        self._dtypes: dict[fx.Node, torch.dtype | None] = {}

    # ---- what everything below is made of

    def call(self, target: Callable[..., Any], *args: Any, _like: Any = None, **kwargs: Any) -> fx.Node:
        """A node that calls `target`; its element type is taken to be that of `_like`, or of the first argument."""
        node = self.graph.call(target, args, kwargs, before=self.before, made_by=self.makers[-1], like=self.like)
        node.meta["provenance"] = (*provenance(self.like), *self.makers)
        self.made.append(node)
        source = args[0] if _like is None and args else _like
        self._dtypes[node] = source if isinstance(source, torch.dtype) else self.dtype(source)
        return node

    def onnx(self, op_type: str, *inputs: Any, _like: Any = None, **attributes: Any) -> fx.Node:
        """A node of the ONNX standard, at the version that the model's opset asks for."""
        given = {name: value for name, value in attributes.items() if value is not None}
        return self.call(OnnxOp("", op_type, since_version(op_type, self.opset)), *inputs, _like=_like, **given)

    def const(self, value: torch.Tensor, hint: str) -> fx.Node:
        """A constant."""
        node = constant_before(self.graph, self.before, value, hint, (*provenance(self.like), *self.makers))
        self.made.append(node)
        self._dtypes[node] = value.dtype
        return node

    def ints(self, values: Sequence[Any], hint: str) -> fx.Node:
        """An int64 vector as a constant, such as a shape."""
        if any(not isinstance(value, int) for value in values):
            raise Unsupported(f"{hint} {list(values)} holds values that are computed at run time")
        wanted = torch.tensor(list(values), dtype=torch.int64)
        for used in self.before.all_input_nodes:  # the node that is replaced may have it already
            constant = self.graph.constant(used)
            if constant is not None and constant.dtype == torch.int64 and torch.equal(constant, wanted):
                return used
        return self.const(wanted, f"{label(self.like)}_{hint}")

    def discard(self) -> None:
        """Erase what was made and is not used."""
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase(node)
        self.made.clear()

    @property
    def is_onnx(self) -> bool:
        """Whether the graph is of the ONNX dialect."""
        return self.graph.origin == "onnx"

    @property
    def opset(self) -> int:
        """The version of the ONNX standard that the model imports."""
        assert self.graph.model is not None
        return self.graph.model.opsets.get("", 1)

    def dtype(self, x: object) -> torch.dtype | None:
        """The element type of a value; None when it is unknown."""
        value = tensor_value(x)
        if value is not None:
            return value.dtype
        if not isinstance(x, fx.Node):
            return None
        constant = self.graph.constant(x)
        return constant.dtype if constant is not None else self._dtypes.get(x)

    def shape(self, shape: fx.Node | Sequence[Any], hint: str = "shape") -> fx.Node:
        """A shape as the ONNX operand that it is."""
        return shape if isinstance(shape, fx.Node) else self.ints(shape, hint)

    # ---- element-wise

    def add(self, x: Operand, y: Operand) -> fx.Node:
        """x + y"""
        return self._binary(aten.add.Tensor, "Add", x, y)

    def sub(self, x: Operand, y: Operand) -> fx.Node:
        """x - y"""
        return self._binary(aten.sub.Tensor, "Sub", x, y)

    def mul(self, x: Operand, y: Operand) -> fx.Node:
        """x * y"""
        return self._binary(aten.mul.Tensor, "Mul", x, y)

    def div(self, x: Operand, y: Operand) -> fx.Node:
        """x / y of floating-point numbers"""
        return self._binary(aten.div.Tensor, "Div", x, y)

    def pow(self, x: Operand, y: Operand) -> fx.Node:
        """x ** y"""
        return self._binary(aten.pow.Tensor_Tensor if isinstance(y, fx.Node) else aten.pow.Tensor_Scalar, "Pow", x, y)

    def maximum(self, x: Operand, y: Operand) -> fx.Node:
        """max(x, y)"""
        return self._binary(aten.maximum.default, "Max", x, self._node(y, x))

    def minimum(self, x: Operand, y: Operand) -> fx.Node:
        """min(x, y)"""
        return self._binary(aten.minimum.default, "Min", x, self._node(y, x))

    def where(self, condition: fx.Node, x: Operand, y: Operand) -> fx.Node:
        """x where the condition holds, else y"""
        x, y = self._node(x, y), self._node(y, x)
        if self.is_onnx:
            return self.onnx("Where", condition, x, y, _like=x)
        return self.call(aten.where.self, condition, x, y, _like=x)

    def relu(self, x: fx.Node) -> fx.Node:
        """max(x, 0)"""
        return self._unary(aten.relu.default, "Relu", x)

    def sigmoid(self, x: fx.Node) -> fx.Node:
        """1 / (1 + exp(-x))"""
        return self._unary(aten.sigmoid.default, "Sigmoid", x)

    def tanh(self, x: fx.Node) -> fx.Node:
        """tanh(x)"""
        return self._unary(aten.tanh.default, "Tanh", x)

    def erf(self, x: fx.Node) -> fx.Node:
        """erf(x)"""
        return self._unary(aten.erf.default, "Erf", x)

    def exp(self, x: fx.Node) -> fx.Node:
        """e ** x"""
        return self._unary(aten.exp.default, "Exp", x)

    def log(self, x: fx.Node) -> fx.Node:
        """ln(x)"""
        return self._unary(aten.log.default, "Log", x)

    def sqrt(self, x: fx.Node) -> fx.Node:
        """The square root of x"""
        return self._unary(aten.sqrt.default, "Sqrt", x)

    def rsqrt(self, x: fx.Node) -> fx.Node:
        """1 / sqrt(x)"""
        return self.reciprocal(self.sqrt(x)) if self.is_onnx else self.call(aten.rsqrt.default, x)

    def reciprocal(self, x: fx.Node) -> fx.Node:
        """1 / x"""
        return self._unary(aten.reciprocal.default, "Reciprocal", x)

    def neg(self, x: fx.Node) -> fx.Node:
        """-x"""
        return self._unary(aten.neg.default, "Neg", x)

    def abs(self, x: fx.Node) -> fx.Node:
        """|x|"""
        return self._unary(aten.abs.default, "Abs", x)

    def sin(self, x: fx.Node) -> fx.Node:
        """sin(x)"""
        return self._unary(aten.sin.default, "Sin", x)

    def cos(self, x: fx.Node) -> fx.Node:
        """cos(x)"""
        return self._unary(aten.cos.default, "Cos", x)

    def identity(self, x: fx.Node) -> fx.Node:
        """x"""
        return self._unary(aten.alias.default, "Identity", x)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x with another element type"""
        if not self.is_onnx:
            return self.call(aten._to_copy.default, x, _like=dtype, dtype=dtype)
        if self.opset < 6:
            raise Unsupported(f"Cast of opset {self.opset}; opset 6 or later is needed")
        return self.onnx("Cast", x, _like=dtype, to=FROM_TORCH[dtype])

    # ---- shapes

    def reshape(self, x: fx.Node, shape: fx.Node | Sequence[Any]) -> fx.Node:
        """x with another shape; -1 is inferred, 0 is a size"""
        if not self.is_onnx:
            return self.call(aten.reshape.default, x, list(shape))  # type: ignore[arg-type]
        if self.opset < 5:
            raise Unsupported(f"Reshape of opset {self.opset}; opset 5 or later is needed")
        empty = not isinstance(shape, fx.Node) and 0 in shape
        if empty and self.opset < 14:
            raise Unsupported(f"the shape {list(shape)} has a size 0, which Reshape knows since opset 14")  # type: ignore[arg-type]
        return self.onnx("Reshape", x, self.shape(shape), allowzero=1 if empty else None)

    def transpose(self, x: fx.Node, perm: Sequence[int]) -> fx.Node:
        """x with its axes in the order `perm`"""
        if self.is_onnx:
            return self.onnx("Transpose", x, perm=list(perm))
        return self.call(aten.permute.default, x, list(perm))

    def expand(self, x: fx.Node, shape: fx.Node | Sequence[Any]) -> fx.Node:
        """x broadcast to a shape; -1 and 1 keep the size of x"""
        if not self.is_onnx:
            return self.call(aten.expand.default, x, list(shape))  # type: ignore[arg-type]
        if not isinstance(shape, fx.Node):
            shape = [1 if size == -1 else size for size in shape]
        return self.onnx("Expand", x, self.shape(shape))

    def squeeze(self, x: fx.Node, axes: Sequence[int]) -> fx.Node:
        """x without these axes of size 1"""
        if not self.is_onnx:
            return self.call(aten.squeeze.dims, x, list(axes))
        return self._with_axes("Squeeze", 13, x, axes)

    def unsqueeze(self, x: fx.Node, axes: Sequence[int]) -> fx.Node:
        """x with axes of size 1 inserted, counted in the result"""
        if self.is_onnx:
            return self._with_axes("Unsqueeze", 13, x, axes)
        for axis in sorted(axes):
            x = self.call(aten.unsqueeze.default, x, axis)
        return x

    def slice(
        self, x: fx.Node, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
    ) -> fx.Node:
        """x[start:end:step] along each of the axes"""
        if not self.is_onnx:
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                x = self.call(aten.slice.Tensor, x, axis, start, end, step)
            return x
        if self.opset < 10:
            raise Unsupported(f"Slice of opset {self.opset}; opset 10 or later is needed")
        named = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
        return self.onnx("Slice", x, *(self.ints(values, hint) for hint, values in named.items()))

    def concat(self, xs: Sequence[fx.Node], axis: int) -> fx.Node:
        """The values one after the other along an axis"""
        if self.is_onnx:
            return self.onnx("Concat", *xs, axis=axis)
        return self.call(aten.cat.default, list(xs), axis, _like=xs[0])

    # ---- products and reductions

    def matmul(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """x @ y"""
        return self.onnx("MatMul", x, y) if self.is_onnx else self.call(aten.matmul.default, x, y)

    def linear(self, x: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, hint: str) -> fx.Node:
        """x @ weight.T + bias with constants; weight [out, in]"""
        added = None if bias is None else self.const(bias, f"{hint}_bias")
        if not self.is_onnx:
            return self.call(aten.linear.default, x, self.const(weight, f"{hint}_weight"), added)
        value = tensor_value(x)
        if value is not None and value.dim() == 2:
            inputs = [x, self.const(weight, f"{hint}_weight"), *([] if added is None else [added])]
            return self.onnx("Gemm", *inputs, transB=1)
        product = self.matmul(x, self.const(weight.t().contiguous(), f"{hint}_weight"))
        return product if added is None else self.add(product, added)

    def with_weight(self, node: fx.Node, weight: torch.Tensor, bias: torch.Tensor, hint: str) -> fx.Node:
        """The convolution `node` again, with constants as its second and third argument"""
        assert callable(node.target)
        constants = self.const(weight, f"{hint}_weight"), self.const(bias, f"{hint}_bias")
        return self.call(node.target, node.args[0], *constants, *node.args[3:], **self._without(node, "bias"))

    def softmax(self, x: fx.Node, axis: int) -> fx.Node:
        """exp(x) / sum(exp(x)) along an axis"""
        if not self.is_onnx:
            return self.call(aten.softmax.int, x, axis)
        value = tensor_value(x)
        if self.opset < 13 and axis != -1 and (value is None or axis != value.dim() - 1):
            raise Unsupported(f"Softmax of opset {self.opset} along axis {axis}; opset 13 or later is needed")
        return self.onnx("Softmax", x, axis=axis)

    def mean(self, x: fx.Node, axes: Sequence[int], keepdims: bool = False) -> fx.Node:
        """The mean along axes"""
        if self.is_onnx:
            return self._with_axes("ReduceMean", 18, x, axes, keepdims=int(keepdims))
        return self.call(aten.mean.dim, x, list(axes), keepdims)

    def sum(self, x: fx.Node, axes: Sequence[int], keepdims: bool = False) -> fx.Node:
        """The sum of floating-point numbers along axes"""
        if self.is_onnx:
            return self._with_axes("ReduceSum", 13, x, axes, keepdims=int(keepdims))
        return self.call(aten.sum.dim_IntList, x, list(axes), keepdims)

    def amax(self, x: fx.Node, axes: Sequence[int], keepdims: bool = False) -> fx.Node:
        """The maximum along axes"""
        if self.is_onnx:
            return self._with_axes("ReduceMax", 18, x, axes, keepdims=int(keepdims))
        return self.call(aten.amax.default, x, list(axes), keepdims)

    # ---- helpers

    @staticmethod
    def _without(node: fx.Node, name: str) -> dict[str, Any]:
        return {key: value for key, value in node.kwargs.items() if key != name}

    def _unary(self, target: Any, op_type: str, x: fx.Node) -> fx.Node:
        return self.onnx(op_type, x) if self.is_onnx else self.call(target, x)

    def _binary(self, target: Any, op_type: str, x: Operand, y: Operand) -> fx.Node:
        if self.is_onnx and self.opset < _BROADCASTS:
            raise Unsupported(f"{op_type} of opset {self.opset}; opset {_BROADCASTS} or later is needed")
        x = self._node(x, y)
        if self.is_onnx:
            return self.onnx(op_type, x, self._node(y, x))
        return self.call(target, x, y)

    def _node(self, x: Operand, other: Operand) -> fx.Node:
        """A number as a constant of the element type of `other`."""
        if isinstance(x, fx.Node):
            return x
        dtype = self.dtype(other)
        if dtype is None:
            raise Unsupported(f"the number {x} needs the element type of {other}, which is unknown")
        return self.const(torch.tensor(x, dtype=dtype), f"{label(self.like)}_{x}")

    def _with_axes(self, op_type: str, since: int, x: fx.Node, axes: Sequence[int], **attributes: Any) -> fx.Node:
        """An operator whose axes are an attribute before the opset `since` and an operand afterwards."""
        if self.opset < since:
            return self.onnx(op_type, x, axes=list(axes), **attributes)
        return self.onnx(op_type, x, self.ints(axes, "axes"), **attributes)


def constant_before(graph: Graph, before: fx.Node, value: torch.Tensor, hint: str, made_by: tuple[str, ...]) -> fx.Node:
    """A constant next to the node that needs it: `Graph.add_constant` looks for the first operator every time."""
    stem = "".join(char if char.isalnum() else "_" for char in hint).strip("_") or "constant"
    target = f"k_{stem}"
    while hasattr(graph.root, target):
        graph._constant_count += 1
        target = f"k_{stem}_{graph._constant_count}"
    graph.root.register_buffer(target, graph.stored(value))
    with graph.fx.inserting_before(before):
        node: fx.Node = graph.fx.create_node("get_attr", target, name=target)
    node.meta["provenance"] = made_by
    return node


@cache
def since_version(op_type: str, opset: int, domain: str = "") -> int:
    """The version of the operator's schema in force.

    Raises:
        Unsupported: the opset has no such operator.
    """
    if not onnx.defs.has(op_type, opset, domain):
        raise Unsupported(f"opset {opset} of the ONNX standard has no operator {op_type}")
    return int(onnx.defs.get_schema(op_type, opset, domain).since_version)
