"""A graph with fixed sizes to a `Program`: a rule per operator, pointwise neighbours in one kernel, views for free."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from fxopt.backends.tvm.codes import Coded, Format, Levels
from fxopt.backends.tvm.kernels.pointwise import Operand, Tree, pointwise
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.values import DTYPES, TYPES, Slot, Value, row_major
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, label
from fxopt.ir.interpreter import constant_value

_SAME_TYPE = ("layer_norm", "rms_norm")
_SHAPES_ONLY = ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")  # of their operand
_LINEARS = ("linear_w8a8", "linear_w8a8_dynamic", "linear_nbits")
_MOST_OPERANDS = 8  # of a fused expression: more of them need more registers than there are


@dataclass(frozen=True, eq=False)
class Lazy:
    """A pointwise expression that its one user computes: operands are numbered by ("load", index)."""

    tree: Tree
    operands: tuple[Value, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """An operator with its arguments by name, defaults included."""

    node: fx.Node
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has."""
        return self.arguments.get(name, default)


Rule = Callable[["Lowering", Call], Any]


def operator_name(node: fx.Node) -> str:
    """The operator without its overload: "add" for aten.add.Tensor."""
    packet = getattr(node.target, "overloadpacket", None)
    if getattr(node.target, "namespace", "") == "prims":
        return str(packet)
    return str(getattr(packet if packet is not None else node.target, "__name__", node.target))


class Lowering:
    """Lowers nodes one after the other; `metas` has every value as a tensor without data, or as a number."""

    def __init__(self, graph: Graph, program: Program, shapes: list[tuple[int, ...]], rules: dict[str, Rule]) -> None:
        self.graph = graph
        self.program = program
        self.rules = rules
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, Any] = {}  # what can be computed now: tensors, also several of one operator
        self.metas: dict[fx.Node, Any] = {}
        self.fused: dict[fx.Node, fx.Node] = {}  # activation -> the product that computes it
        self.ranged: dict[tuple[fx.Node, Format], tuple[Slot, Value]] = {}  # range and codes of a value
        self._floats: dict[Coded, Value] = {}
        self._codes: dict[tuple[fx.Node, Levels], Value] = {}
        self._infer(shapes)

    # ---- types

    def _infer(self, shapes: list[tuple[int, ...]]) -> None:
        specs = iter(zip(self.graph.inputs, shapes, strict=True))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                spec, shape = next(specs)
                self.metas[node] = torch.empty(shape, dtype=_input_dtype(spec), device="meta")
            elif node.op == "get_attr":
                value = constant_value(self.graph, node)
                self.metas[node] = value
                if isinstance(value, torch.Tensor):
                    self.known[node], self.metas[node] = value, value.to("meta")
            elif node.op == "call_function":
                self._infer_call(node)

    def _infer_call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target is torch.ops.aten.view.default:  # our strides may be others than those that torch made the view for
            target = torch.ops.aten.reshape.default
        inputs = node.all_input_nodes
        args: Any
        kwargs: Any
        args, kwargs = map_arg((node.args, node.kwargs), self.metas.__getitem__)
        try:
            if all(item in self.known or not _has_tensor(self.metas[item]) for item in inputs) and _is_pure(node):
                real, named = map_arg((node.args, node.kwargs), lambda n: self.known.get(n, self.metas[n]))
                found = target(*real, **named)
                if _has_tensor(found):
                    self.known[node] = found
                    found = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), found)
                self.metas[node] = found
                return
            if operator_name(node) in _SHAPES_ONLY:
                shaped: Any = args[0]
                self.known[node] = target(torch.empty_like(shaped, device="cpu"), *args[1:], **kwargs)
                self.metas[node] = self.known[node].to("meta")
                return
            known = _quick_type(operator_name(node), args)
            if known is not None:
                self.metas[node] = known
                return
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "meta"}
            self.metas[node] = target(*args, **kwargs)
        except Exception as error:  # whatever torch raises for a type that it does not take
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                why = "depends on data, which has no kernel"
                raise Unsupported(f"node {label(node)!r}: {node.target} {why}") from error
            raise Unsupported(f"node {label(node)!r}: {node.target} does not take these types: {error}") from error

    # ---- lowering

    def run(self) -> None:
        """Lower everything; the program then has its steps, inputs and outputs.

        Raises:
            Unsupported: an operator has no kernel; the message names the node and the reason.
        """
        self.run_inputs()
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.known and _has_tensor(self.metas[node]):
                self.lower(node)
        for index, result in enumerate(self.graph.result_nodes):
            self.program.why = f"output {index}"
            self.program.outputs.append(self._result(result, index))

    def run_inputs(self) -> None:
        """Make the inputs."""
        for index, node in enumerate(self.graph.placeholders):
            meta = self.metas[node]
            slot = self.program.slot(meta.numel(), dtype_of(meta, node), "input", index)
            self.program.inputs.append(slot)
            self.values[node] = Value(slot, tuple(meta.shape), row_major(tuple(meta.shape)))

    def lower(self, node: fx.Node) -> None:
        """One operator."""
        self.program.why = label(node)
        if node in self.fused:
            self.values[node] = self.values[self.fused[node]]
            return
        if node.target is operator.getitem:
            source: Any = self.values[node.args[0]]  # type: ignore[index]
            self._keep(node, source[node.args[1]])
            return
        rule = self.rules.get(operator_name(node))
        if rule is None:
            raise Unsupported(f"node {label(node)!r}: {node.target} has no kernel")
        try:
            found = rule(self, bound(node))
        except Unsupported as error:
            raise Unsupported(f"node {label(node)!r}: {node.target}: {error}") from error
        self._keep(node, found)

    def _keep(self, node: fx.Node, found: Any) -> None:
        if isinstance(found, Lazy) and not self._may_wait(node):
            found = self.computed(found)
        self.values[node] = found

    def _may_wait(self, node: fx.Node) -> bool:
        """Whether the one user is a pointwise operator over the same elements."""
        from fxopt.backends.tvm.rules.pointwise import RULES

        if len(node.users) != 1 or node in self.graph.result_nodes:
            return False
        (user,) = node.users
        meta = self.metas.get(user)
        return operator_name(user) in RULES and isinstance(meta, torch.Tensor) and meta.shape == self.metas[node].shape

    def _result(self, result: Any, index: int) -> Slot:
        value = self.dense(result)
        slot = value.slot
        if slot.place == "arena" and value.is_contiguous:
            slot.place, slot.index = "output", index
            return slot
        made = self.program.slot(value.count, value.dtype, "output", index)
        self.copy(value, Value(made, value.shape, row_major(value.shape)))
        return made

    # ---- what rules ask for

    def shape(self, node: Any) -> tuple[int, ...]:
        """Of a node's tensor."""
        return tuple(self.metas[node].shape)

    def number(self, argument: Any) -> Any:
        """An argument that is a number, also when a node computes it."""
        return self.metas[argument] if isinstance(argument, fx.Node) else argument

    def constant(self, argument: Any) -> torch.Tensor | None:
        """A tensor that is known now."""
        found: torch.Tensor | None = self.known.get(argument) if isinstance(argument, fx.Node) else None
        return found

    def weight(self, argument: Any, what: str) -> torch.Tensor:
        """A constant float32 tensor."""
        found = self.constant(argument)
        if found is None:
            raise Unsupported(f"its {what} is computed at run time; expected a constant")
        if found.dtype != torch.float32:
            raise Unsupported(f"its {what} is {found.dtype}, expected float32: convert the model with .float()")
        return found.detach().contiguous()

    def value(self, argument: Any) -> Value:
        """Where a tensor lies, perhaps strided."""
        if isinstance(argument, fx.Node) and argument in self.known:
            tensor = self.known[argument]
            dtype_of(tensor, argument)
            slot = self.program.constant(tensor.detach().contiguous().numpy())
            return Value(slot, tuple(tensor.shape), row_major(tuple(tensor.shape)))
        found = self.values[argument]
        if isinstance(found, Lazy):
            found = self.values[argument] = self.computed(found)
        if isinstance(found, Coded):
            return self.floats(found)
        if not isinstance(found, Value):
            raise Unsupported(f"{argument} is no tensor")
        return found

    def dense(self, argument: Any, dtype: str = "") -> Value:
        """A tensor whose elements lie in order from its slot's start; copied when they do not."""
        value = argument if isinstance(argument, Value) else self.value(argument)
        if dtype and value.dtype != dtype:
            raise Unsupported(f"an operand is {value.dtype}, expected {dtype}")
        if value.is_contiguous:
            return value
        made = self.program.value(value.shape, value.dtype)
        self.copy(value, made)
        return made

    def coded(self, argument: Any) -> Coded | None:
        """A tensor that lies there as codes."""
        found = self.values.get(argument) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, Coded) else None

    def floats(self, coded: Coded) -> Value:
        """The float32 tensor that codes stand for."""
        if coded not in self._floats:
            made = self._floats[coded] = self.program.value(coded.value.shape)
            self.emit(("decode", ("load", 0), coded.levels), (coded.value,), made)
        return self._floats[coded]

    def codes(self, argument: fx.Node, levels: Levels) -> Value:
        """The stored codes of a tensor on levels, contiguous."""
        known = self.coded(argument)
        if known is not None and known.levels == levels:
            return self.dense(known.value)
        if (argument, levels) not in self._codes:
            shape = self.shape(argument)
            tree, operands, dtype = self.parts(argument, shape)
            if dtype != "float32":
                raise Unsupported(f"takes float32, the operand is {dtype}")
            made = self._codes[argument, levels] = self.program.value(shape, levels.stored.dtype)
            self.emit(("encode", tree, levels), operands, made)
        return self._codes[argument, levels]

    def copy(self, source: Value, target: Value) -> None:
        """Elements of one tensor into another one of the same shape."""
        self.emit(("load", 0), (source,), target)

    def computed(self, lazy: Lazy) -> Value:
        """The tensor of an expression."""
        made = self.program.value(lazy.shape, lazy.dtype)
        self.emit(lazy.tree, lazy.operands, made)
        return made

    def emit(self, tree: Tree, operands: tuple[Value, ...], target: Value) -> None:
        """A pointwise kernel."""
        if target.count == 0:
            return
        described = tuple(
            Operand(_broadcast(item, target.shape), item.offset, item.slot.count, item.dtype) for item in operands
        )
        place = Operand(target.strides, target.offset, target.slot.count, target.dtype)
        slots = [item.slot for item in operands]
        self.program.call(pointwise, (tree, target.shape, described, place), *slots, target.slot)

    def parts(self, argument: Any, shape: tuple[int, ...]) -> tuple[Tree, tuple[Value, ...], str]:
        """An operand of a pointwise operator: its expression, what it reads, its type."""
        found = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if isinstance(found, Lazy):
            if found.shape == shape and len(found.operands) < _MOST_OPERANDS:
                return found.tree, found.operands, found.dtype
            found = self.values[argument] = self.computed(found)
        value = self.value(argument)
        return ("load", 0), (value,), value.dtype


def bound(node: fx.Node) -> Call:
    """The node's arguments by the names of its schema."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return Call(node, {str(i): argument for i, argument in enumerate(node.args)} | dict(node.kwargs))
    arguments: dict[str, Any] = {}
    for position, declared in enumerate(schema.arguments):
        if position < len(node.args) and not declared.kwarg_only:
            arguments[declared.name] = node.args[position]
        elif declared.name in node.kwargs:
            arguments[declared.name] = node.kwargs[declared.name]
        else:
            arguments[declared.name] = declared.default_value if declared.has_default_value() else None
    return Call(node, arguments)


def dtype_of(tensor: torch.Tensor, node: Any) -> str:
    """TVM's element type.

    Raises:
        Unsupported: kernels do not have the type.
    """
    if tensor.dtype not in DTYPES:
        name = label(node) if isinstance(node, fx.Node) else str(node)
        raise Unsupported(f"node {name!r} is {tensor.dtype}; the kernels take {TYPES}")
    return DTYPES[tensor.dtype]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _quick_type(name: str, args: tuple[Any, ...]) -> torch.Tensor | None:
    """The types of results that torch takes long to find out, or finds by unpacking the weight."""
    if name in _SAME_TYPE:
        return torch.empty_like(args[0])
    if name in _LINEARS and len(args) > 1:
        return torch.empty((*args[0].shape[:-1], args[1].shape[0]), dtype=args[0].dtype, device="meta")
    return None


def _has_tensor(value: Any) -> bool:
    return any(True for _ in tensors(value))


def _is_pure(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _input_dtype(spec: Any) -> torch.dtype:
    if spec.dtype is None:
        raise Unsupported(f"input {spec.name!r} has a type that torch cannot hold")
    found: torch.dtype = spec.dtype
    return found


def _broadcast(value: Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    missing = len(shape) - len(value.shape)
    strides = [0 if size == 1 else stride for size, stride in zip(value.shape, value.strides, strict=True)]
    return (0,) * missing + tuple(strides)
