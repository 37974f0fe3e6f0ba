"""What must hold before anything else reads an ONNX message: names, order, operator sets, depth, bytes of tensors.

The ONNX checker recurses into sub-graphs and trusts declared shapes; this walk is linear and does neither. It runs
first, so the checker sees only what it can stand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from fxopt.errors import InvalidModel
from fxopt.ir.onnx.tensor_bytes import check_tensor
from fxopt.ir.onnx.walk import all_nodes, graphs_of, tensors_of

DEPTH_LIMIT = 30  # nested sub-graphs; protobuf reads 100 nested messages, three for each sub-graph
_MOST_ELEMENTS = 1 << 59  # of at most 16 bytes
_ELEMENT_TYPES = frozenset(TensorProto.DataType.values())
_Key = tuple[str, str, str]  # domain, name, overload


def check_message(model: ModelProto, folder: Path | None, elsewhere: Collection[str] = ()) -> set[Path]:
    """Check a model before it is read; returns the files that hold its external data.

    Args:
        folder: the folder of the model's file, where external data must be; None for a message alone.
        elsewhere: initializers whose bytes the caller has.

    Raises:
        InvalidModel: an operator set is missing or given twice, sub-graphs are nested too deeply, functions call
            themselves, a name is given twice or is not UTF-8, a value is used that nothing computes before, or a
            tensor's bytes do not match its shape.
    """
    if not model.HasField("graph"):
        raise InvalidModel("the model holds no graph; expected a ModelProto with one")
    _check_depth(model)
    opsets = _opsets(model.opset_import, "the model")
    walk = _Walk(folder, frozenset(elsewhere))
    _check_functions(model.functions)
    walk.graph(model.graph, frozenset(), opsets)
    if not model.graph.output:
        raise InvalidModel(f"the graph {model.graph.name!r} has no outputs, so it computes nothing")
    for function in model.functions:
        walk.function(function, _opsets(function.opset_import, f"the function {function.name!r}"))
    return walk.files


def _check_depth(model: ModelProto) -> None:
    waiting = [(node, 0) for node in model.graph.node if node.attribute]
    waiting += [(node, 0) for function in model.functions for node in function.node if node.attribute]
    while waiting:
        node, depth = waiting.pop()
        for graph in graphs_of(node):
            if depth >= DEPTH_LIMIT:
                raise InvalidModel(
                    f"node {_label(node)!r} is inside {depth} nested sub-graphs; at most {DEPTH_LIMIT} are supported, "
                    "since protobuf reads no deeper messages"
                )
            waiting += [(inner, depth + 1) for inner in graph.node if inner.attribute]


def _opsets(entries: Iterable[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
    found: dict[str, int] = {}
    newest = onnx.defs.onnx_opset_version()
    for entry in entries:
        _check_text(where, entry.domain)
        domain = _domain(entry.domain)
        if domain in found and found[domain] != entry.version:
            raise InvalidModel(
                f"{where} imports the operator set {domain or 'ai.onnx'!r} twice: {found[domain]} and {entry.version}"
            )
        if entry.version < 1 or (not domain and entry.version > newest):
            raise InvalidModel(
                f"{where} imports version {entry.version} of the operator set {domain or 'ai.onnx'!r}; "
                f"expected 1 {'or more' if domain else _newest(entry.version)}"
            )
        found[domain] = entry.version
    return found


def _newest(version: int) -> str:
    known = onnx.defs.onnx_opset_version()
    advice = "; install a newer one, or export the model at an older version" if version > known else ""
    return f"to {known}, the newest that is known to the installed onnx {onnx.__version__}{advice}"


def _check_functions(functions: Sequence[FunctionProto]) -> None:
    """Names once, and no calls in a circle; without recursion."""
    calls: dict[_Key, list[_Key]] = {}
    for function in functions:
        _check_text("a function", function.domain, function.name, function.overload)
        key = (_domain(function.domain), function.name, function.overload)
        if key in calls:
            raise InvalidModel(f"the function {_shown(key)} is defined twice")
        calls[key] = [(_domain(node.domain), node.op_type, node.overload) for node in all_nodes(function.node)]
    state: dict[_Key, int] = {}  # 1: on the path, 2: done
    for start in calls:
        path = [(start, iter(calls[start]))] if start not in state else []
        state.setdefault(start, 1)
        while path:
            key, rest = path[-1]
            called = next((name for name in rest if name in calls and state.get(name) != 2), None)
            if called is None:
                state[key] = 2
                path.pop()
            elif state.get(called) == 1:
                circle = [_shown(name) for name, _ in path[[name for name, _ in path].index(called) :]]
                raise InvalidModel(
                    f"the function {circle[0]} calls itself: {' -> '.join([*circle, circle[0]])}; functions of a "
                    "model must not be recursive"
                )
            else:
                state[called] = 1
                path.append((called, iter(calls[called])))


@dataclass
class _Walk:
    folder: Path | None
    elsewhere: frozenset[str]
    files: set[Path] = field(default_factory=set)

    def graph(self, graph: GraphProto, outer: frozenset[str], opsets: dict[str, int]) -> None:
        """One graph; `outer` are the values that it may take from the graphs around it."""
        where = f"the graph {graph.name!r}"
        _check_text(where, graph.name, *(value.name for value in graph.value_info))
        values = _named((value.name for value in graph.input), f"{where} has the input")
        constants = _named((tensor.name for tensor in graph.initializer), f"{where} has the initializer")
        sparse = (tensor.values.name for tensor in graph.sparse_initializer)
        constants |= _named(sparse, f"{where} has the sparse initializer", constants)
        for tensor in graph.initializer:
            if tensor.name not in self.elsewhere:
                self.tensor(tensor)
        for item in graph.sparse_initializer:
            self.tensor(item.values)
            self.tensor(item.indices)
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_shape(value)
        values = self.nodes(graph.node, values | constants, outer, opsets, where)
        for result in graph.output:
            if result.name not in values and result.name not in outer:
                raise InvalidModel(f"{where} has the output {result.name!r}, which is not computed by any node")

    def function(self, function: FunctionProto, opsets: dict[str, int]) -> None:
        """One function: only its inputs are known in it."""
        where = f"the function {function.name!r}"
        _check_text(where, *function.output, *function.attribute)
        values = self.nodes(function.node, _named(function.input, f"{where} has the input"), frozenset(), opsets, where)
        for name in function.output:
            if name not in values:
                raise InvalidModel(f"{where} has the output {name!r}, which is not computed by any node")

    def nodes(
        self,
        nodes: Sequence[NodeProto],
        values: set[str],
        outer: frozenset[str],
        opsets: dict[str, int],
        where: str,
    ) -> set[str]:
        """Check nodes in order; returns all values of the graph."""
        for index, node in enumerate(nodes):
            _check_text(where, node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
            if not node.op_type:
                raise InvalidModel(f"node {_label(node)!r} of {where} has no operator")
            if _domain(node.domain) not in opsets:
                raise InvalidModel(
                    f"node {_label(node)!r} is a {node.op_type} of the domain {_domain(node.domain) or 'ai.onnx'!r}, "
                    f"but {where} imports only the operator sets {sorted(name or 'ai.onnx' for name in opsets)}; "
                    "add it to opset_import"
                )
            for name in node.input:
                if name and name not in values and name not in outer:
                    raise InvalidModel(_why_unknown(nodes, index, name, where))
            self.attributes(node, values, outer, opsets)
            for name in node.output:
                if not name:
                    continue
                if name in values:
                    raise InvalidModel(
                        f"node {_label(node)!r} of {where} computes {name!r}, which exists already; "
                        "a value has one name and one source"
                    )
                values.add(name)
        return values

    def tensor(self, tensor: TensorProto) -> None:
        place = check_tensor(tensor, self.folder)
        if place is not None:
            self.files.add(place.file)

    def attributes(self, node: NodeProto, values: set[str], outer: frozenset[str], opsets: dict[str, int]) -> None:
        seen: set[str] = set()
        for attribute in node.attribute:
            _check_text(f"node {_label(node)!r}", attribute.name, attribute.ref_attr_name)
            if not attribute.name or attribute.name in seen:
                raise InvalidModel(f"node {_label(node)!r} has the attribute {attribute.name!r} twice or without name")
            seen.add(attribute.name)
            _check_type(node, attribute)
            for tensor in tensors_of(attribute):
                self.tensor(tensor)
        for graph in graphs_of(node):
            self.graph(graph, outer | values, opsets)


def _check_text(where: str, *names: object) -> None:
    """Names are UTF-8: protobuf gives bytes for what is not."""
    for name in names:
        if not isinstance(name, str):
            raise InvalidModel(f"{where}: the name {name!r} is not UTF-8")


def _check_shape(value: ValueInfoProto) -> None:
    """Declared sizes are numbers that a tensor can have; -1 counts as unknown."""
    dims = value.type.tensor_type.shape.dim
    _check_text(f"the type of {value.name!r}", *(dim.dim_param for dim in dims))
    kind = value.type.tensor_type.elem_type
    if kind not in _ELEMENT_TYPES:
        raise InvalidModel(f"the value {value.name!r} has the element type {kind}, which ONNX does not define")
    sizes = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
    if any(size < -1 for size in sizes) or math.prod(max(size, 1) for size in sizes) >= _MOST_ELEMENTS:
        raise InvalidModel(
            f"the value {value.name!r} is declared with the sizes {sizes}; expected sizes of 0 or more and fewer than "
            "2^59 elements, or names for dynamic sizes"
        )


def _check_type(node: NodeProto, attribute: AttributeProto) -> None:
    """The field that the type names is the one that is there."""
    if attribute.type not in AttributeProto.AttributeType.values() or not attribute.type:
        raise InvalidModel(f"node {_label(node)!r}: the attribute {attribute.name!r} has no known type")
    field_name = _FIELDS[attribute.type]
    others = [name for name in _FIELDS.values() if name != field_name and _holds(attribute, name)]
    single = field_name in ("f", "i", "s", "t", "g", "sparse_tensor", "tp")
    if others or (single and not attribute.ref_attr_name and not attribute.HasField(field_name)):
        kind = AttributeProto.AttributeType.Name(attribute.type)
        raise InvalidModel(
            f"node {_label(node)!r}: the attribute {attribute.name!r} is a {kind}, but holds {others or 'nothing'}"
        )


_FIELDS: dict[int, str] = {
    AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s", AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor", AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors", AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors", AttributeProto.TYPE_PROTOS: "type_protos",
}  # fmt: skip


def _holds(attribute: AttributeProto, name: str) -> bool:
    if name.endswith("s") and len(name) > 1:
        return len(getattr(attribute, name)) > 0
    return attribute.HasField(name)


def _named(names: Iterable[str], what: str, known: Collection[str] = ()) -> set[str]:
    found: set[str] = set()
    for name in names:
        _check_text(what, name)
        if not name:
            raise InvalidModel(f"{what} without a name")
        if name in found or name in known:
            raise InvalidModel(f"{what} {name!r} twice")
        found.add(name)
    return found


def _why_unknown(nodes: Sequence[NodeProto], index: int, name: str, where: str) -> str:
    text = f"node {_label(nodes[index])!r} of {where} uses the value {name!r}, which "
    source = next((place for place, node in enumerate(nodes) if name in node.output), None)
    if source is None:
        return f"{text}nothing before it computes: no input, initializer or node has that name"
    if _reaches(nodes, index, source):
        return f"{text}depends on it: the graph has a cycle"
    return f"{text}nothing before it computes, but {_label(nodes[source])!r} after it; nodes must be sorted"


def _reaches(nodes: Sequence[NodeProto], start: int, end: int) -> bool:
    """Whether the node `end` depends on the node `start`; linear."""
    users: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in node.input:
            users.setdefault(name, []).append(place)
    waiting, seen = [start], {start}
    while waiting:
        place = waiting.pop()
        if place == end:
            return True
        fresh = {user for name in nodes[place].output for user in users.get(name, ())} - seen
        seen |= fresh
        waiting += fresh
    return False


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _shown(key: _Key) -> str:
    return "::".join(part for part in key if part)


def _label(node: NodeProto) -> str:
    return node.name or next(iter(filter(None, node.output)), "") or node.op_type
