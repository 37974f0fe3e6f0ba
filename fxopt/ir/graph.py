"""`Graph`: one model as a `torch.fx` graph with a signature, constants, provenance and one origin.

Nodes are `placeholder`, `get_attr` (constants), `call_function` (an aten operator, an `OnnxOp`, an fxopt operator or
`operator.getitem`) and one `output`, whose argument is a tuple. Constants live as attributes of `root`; they are never
changed in place, so copies of a graph share them.

A body of If, Loop and the like is a `Graph` of its own, held by a constant of the graph around it
(`fxopt.ir.subgraphs`). Its last inputs are the values that it captures from there, named by `captures`; the owner has
them as `_captured`, named by `_captured_names`. Copies of a graph have copies of its bodies.

`node.meta` keys that fxopt owns:

- `val`: what the node gives under fake tensors (FakeTensor, host array, tuple), or absent when unknown;
- `probe`: the same at other sizes of the named dimensions; `failure`: why fake tensors do not go through it;
- `unknown`: why the type of a node with bodies is (in part) unknown;
- `onnx`: the record of the ONNX node, constant or input it came from (`fxopt.ir.onnx.records`);
- `stands_for`: the name of the node that it replaced, by which calibration statistics are found;
- `sparsity`: the zeros that its weight must keep (`fxopt.ir.sparsity.Mark`);
- `levels`: scale and zero point of the 256 levels that span the value's range on the calibration data;
- `provenance`: a tuple of strings, oldest first: where the node came from and which passes made it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from fxopt.ir.onnx.records import ModelRecord
    from fxopt.ir.subgraphs import Subgraph

Dim = int | str | None  # fixed, named, or unknown
Origin = Literal["torch", "onnx"]


@dataclass(frozen=True)
class ValueSpec:
    """Name, element type and shape of an input or output; `dtype` None means that torch cannot hold it."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        dtype = "opaque" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        shape = "..." if self.shape is None else ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {dtype}[{shape}]"


class Opaque:
    """A constant that torch cannot hold (strings, 4-bit integers, sub-graphs): its protobuf message, kept as it is."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.value: Any = None  # what it is in a run, once it is known (`fxopt.ir.onnx.values.opaque_value`)

    def __repr__(self) -> str:
        return f"Opaque({type(self.proto).__name__})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Opaque:
        return self


@dataclass
class Graph:
    """A model: an fx graph, the module that holds its constants, and its signature."""

    fx: FxGraph
    root: torch.nn.Module
    origin: Origin
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    name: str = "main"
    model: ModelRecord | None = None  # what an ONNX file holds beside its nodes
    call_spec: Any = None  # how a torch-born model's forward is called (`fxopt.frontends.capture.call_spec.CallSpec`)
    sizes: dict[str, int] = field(default_factory=dict)  # of named dimensions, for which costs are computed
    captures: tuple[str, ...] = ()  # of a body: the names of its last inputs, values of the graphs around it
    _constant_count: int = field(default=0, repr=False)
    _by_name: dict[str, Node] = field(default_factory=dict, repr=False, compare=False)  # see `find`
    _anchor: Node | None = field(default=None, repr=False, compare=False)  # see `_first_call`
    # where large new constants go, see `stored`
    store: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def module(self) -> GraphModule:
        """A `torch.fx.GraphModule` over this graph (shared nodes and constants), for callers that want one."""
        return GraphModule(self.root, self.fx)

    # ---- reading

    @property
    def nodes(self) -> Iterable[Node]:
        """All nodes in execution order."""
        return self.fx.nodes

    @property
    def placeholders(self) -> list[Node]:
        """The input nodes, in the order of `inputs`."""
        return list(self.fx.find_nodes(op="placeholder"))

    def calls(self) -> Iterator[Node]:
        """The operator nodes (`getitem` left out), in execution order."""
        for node in self.fx.nodes:
            if node.op == "call_function" and node.target is not operator.getitem:
                yield node

    @property
    def output(self) -> Node:
        """The output node; `output.args[0]` is a tuple of nodes."""
        return self.fx.output_node()

    @property
    def result_nodes(self) -> tuple[Any, ...]:
        """The nodes whose values the graph returns."""
        returned = self.output.args[0]
        return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)

    def attribute(self, target: str) -> Any:
        """The object that a `get_attr` target names."""
        value: Any = self.root
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def constant(self, node: object) -> torch.Tensor | None:
        """The tensor of a `get_attr` node; None for every other argument."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        value = self.attribute(str(node.target))
        return value.detach() if isinstance(value, torch.Tensor) else None

    def find(self, name: str) -> Node | None:
        """The node of this fx name or ONNX node name."""
        found = self._by_name.get(name)
        if found is None or not self._holds(found) or name not in (found.name, label(found)):
            self._by_name.clear()
            for node in self.fx.nodes:
                self._by_name.setdefault(node.name, node)
                self._by_name.setdefault(label(node), node)
            found = self._by_name.get(name)
        return found

    def _holds(self, node: Node) -> bool:
        return node.graph is self.fx and not node._erased

    def size_bytes(self) -> int:
        """Bytes of all constants that a node refers to, each counted once; those of bodies too."""
        seen = {str(node.target): self.attribute(str(node.target)) for node in self.fx.find_nodes(op="get_attr")}
        return sum(_bytes(value) for value in seen.values())

    def subgraphs(self, *, recursive: bool = True) -> Iterator[Subgraph]:
        """The bodies that the nodes hold, in execution order, each before the bodies in it."""
        from fxopt.ir.subgraphs import subgraphs

        return subgraphs(self, recursive=recursive)

    # ---- changing

    def stored(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor as a new constant is kept: as it is, or in a file when the model is too large for the memory."""
        return value.detach() if self.store is None else self.store(value.detach())

    def add_constant(self, value: torch.Tensor | Opaque, hint: str, provenance: tuple[str, ...] = ()) -> Node:
        """A new `get_attr` node for `value`, placed before the first operator; `hint` becomes part of its name."""
        stem = "".join(char if char.isalnum() else "_" for char in hint).strip("_") or "constant"
        target = f"k_{stem}"
        while hasattr(self.root, target):
            self._constant_count += 1
            target = f"k_{stem}_{self._constant_count}"
        if isinstance(value, torch.Tensor):
            self.root.register_buffer(target, self.stored(value))
        else:
            setattr(self.root, target, value)
        with self.fx.inserting_before(self._first_call()):
            node: Node = self.fx.create_node("get_attr", target, name=target)
        node.meta["provenance"] = provenance
        return node

    def _first_call(self) -> Node:
        """The first operator; the one found last is still it unless an operator was put right before it."""
        leading = ("placeholder", "get_attr")
        last = self._anchor
        if last is None or not self._holds(last) or last.op in leading or last.prev.op not in leading:
            last = next((node for node in self.fx.nodes if node.op not in leading), None)
            assert last is not None, "a graph has an output node"
            self._anchor = last
        return last

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        before: Node,
        made_by: str,
        like: Node | None = None,
        name: str | None = None,
    ) -> Node:
        """A new operator node before `before`; its provenance is that of `like` plus `made_by` (the pass or rule)."""
        with self.fx.inserting_before(before):
            node = self.fx.create_node("call_function", target, args, kwargs or {}, name=name)
        source = before if like is None else like
        node.meta["provenance"] = (*provenance(source), made_by)
        for key in ("stack_trace", "nn_module_stack", "sparsity"):
            if key in source.meta and (key != "sparsity" or like is not None):
                node.meta[key] = source.meta[key]
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Give every use of `old` to `new` and erase `old`; a new node takes over the name of the value in the file."""
        if "val" not in new.meta:  # made just now: statistics of the old value are those of the new one
            new.meta["stands_for"] = old.meta.get("stands_for", old.name)
            if "sparsity" in old.meta:
                new.meta.setdefault("sparsity", old.meta["sparsity"])
        old.replace_all_uses_with(new)
        if "onnx" in old.meta and "onnx" not in new.meta and new.op == "call_function":
            new.meta["onnx"] = old.meta["onnx"].handed_over()
        self.fx.erase_node(old)

    def erase(self, node: Node) -> None:
        """Remove a node without users, and its constant when no other node refers to it."""
        self.fx.erase_node(node)

    def prune(self) -> int:
        """Remove every operator, constant and captured value that is not used; returns how many."""
        from fxopt.ir.subgraphs import without_unused_captures

        removed = without_unused_captures(self)
        for node in reversed(list(self.fx.nodes)):
            if node.users or node.op in ("placeholder", "output") or has_effect(node):
                continue
            self.fx.erase_node(node)
            removed += 1
        self.release_constants()
        return removed

    def release_constants(self) -> None:
        """Drop the tensors of `root` that no node refers to (copies that share them keep them)."""
        used = {str(node.target) for node in self.fx.nodes if node.op == "get_attr"}
        named = (*self.root.named_buffers(remove_duplicate=False), *self.root.named_parameters(remove_duplicate=False))
        for name, _ in named:
            if name not in used:
                path, _, last = name.rpartition(".")
                delattr(self.root.get_submodule(path), last)

    def copy(self) -> Graph:
        """An independent graph that shares the tensors."""
        root = torch.nn.Module()
        fresh = FxGraph()
        mapping: dict[Node, Node] = {}
        for node in self.fx.nodes:
            mapping[node] = fresh.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
            if node.op == "get_attr":
                value = self.attribute(str(node.target))
                set_attribute(root, str(node.target), value.copy() if isinstance(value, Graph) else value)
        model = copy.copy(self.model) if self.model is not None else None
        return Graph(
            fresh,
            root,
            self.origin,
            self.inputs,
            self.outputs,
            self.name,
            model,
            self.call_spec,
            dict(self.sizes),
            self.captures,
            self._constant_count,
            store=self.store,
        )

    # ---- running

    def run(self, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """Run the graph in torch on flat inputs; see `fxopt.ir.interpreter.run` for the options."""
        from fxopt.ir.interpreter import run

        return run(self, inputs, **options)

    def lower(self, **options: Any) -> Graph:
        """The graph in aten operators, with dynamic sizes; see `fxopt.ir.lower.lower.lower` for the options."""
        from fxopt.ir.lower import lower

        return lower(self, **options)


def _bytes(value: Any) -> int:
    if isinstance(value, Graph):
        return value.size_bytes()
    if isinstance(value, Opaque):
        from fxopt.ir.onnx.tensor_bytes import byte_count

        return byte_count(value.proto) if type(value.proto).__name__ == "TensorProto" else 0
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def set_attribute(root: torch.nn.Module, target: str, value: Any) -> None:
    """Put a constant under a dotted name, making the modules between."""
    *path, last = target.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.nn.Parameter):
        root.register_parameter(last, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)


def provenance(node: Node) -> tuple[str, ...]:
    """Where the node came from, oldest first."""
    recorded: tuple[str, ...] | None = node.meta.get("provenance")
    return (label(node),) if recorded is None else recorded


def label(node: Node) -> str:
    """The name a user knows the node by: the ONNX node's name, else the fx name."""
    record = node.meta.get("onnx")
    named: str = getattr(record, "name", "") or ""
    return named or node.name


def has_effect(node: Node) -> bool:
    """True for an operator that must run although nobody uses its value (assertions, in-place operators)."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return True
    return node.is_impure() if isinstance(node.target, torch._ops.OpOverload) else False


def tensor_value(node: object) -> torch.Tensor | None:
    """The fake tensor of a node, or None when it is unknown or not a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class DynamicSize:
    """A dimension of a named, dynamic size: its values at the two sizes that types are derived for."""

    size: int
    other: int

    def __str__(self) -> str:
        return f"{self.size}|{self.other}"


def type_of(node: Node) -> tuple[Any, Any] | None:
    """The node's fake values at both sizes of dynamic dimensions (`fxopt.ir.shapes`); None when unknown."""
    value = node.meta.get("val")
    return None if value is None else (value, node.meta.get("probe", value))


def merged_shape(value: Any, probe: Any) -> tuple[Any, ...] | None:
    """The shape of a tensor with an int where both values agree; None when they are no tensors of one rank."""
    if not isinstance(value, torch.Tensor) or not isinstance(probe, torch.Tensor) or value.dim() != probe.dim():
        return None
    if value is probe:
        return tuple(value.shape)
    pairs = zip(value.shape, probe.shape, strict=True)
    return tuple(size if size == other else DynamicSize(size, other) for size, other in pairs)


def shape_of(node: object) -> tuple[Any, ...] | None:
    """The node's shape: an int where a dimension is fixed, else a `DynamicSize` or SymInt; None when unknown."""
    known = type_of(node) if isinstance(node, Node) else None
    return None if known is None else merged_shape(*known)


def hint(dim: Any) -> int:
    """A dimension as a number: itself, or the size of a dynamic one for which costs are computed."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, DynamicSize):
        return dim.size
    from fxopt.ir.shapes import size_of

    return size_of(dim) or 1
