"""One graph of a model - the main one, a sub-graph, a function's body - as a `Graph`, node by node."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto
from torch import fx

from fxopt.errors import InvalidModel
from fxopt.frontends.onnx_import import gradient, tensors
from fxopt.frontends.onnx_import.functions import PLAIN, Function, Key, called, plain_value
from fxopt.frontends.onnx_import.messages import captured_names, graph_header, without_subgraphs
from fxopt.ir.graph import Graph, Opaque, ValueSpec
from fxopt.ir.onnx import marks
from fxopt.ir.onnx.bodies import DEFAULTS, AttributeReference
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ConstantRecord, InputRecord, ModelRecord, NodeRecord
from fxopt.ir.onnx.signature import value_spec
from fxopt.ir.onnx.walk import graphs_of
from fxopt.ir.subgraphs import CAPTURED, CAPTURED_NAMES, FUNCTION

DEPTH_LIMIT = 60  # sub-graphs and functions inside each other


@dataclass
class Model:
    """What all graphs of a model share."""

    folder: Path | None
    weights: Mapping[str, torch.Tensor]
    ir_version: int
    functions: dict[Key, FunctionProto]
    imported: dict[Key, Function] = field(default_factory=dict)
    calling: list[Key] = field(default_factory=list)  # the functions around what is imported now
    external: bool = False
    depth: int = 0

    @contextmanager
    def deeper(self, name: str) -> Iterator[None]:
        """While a sub-graph or function is imported.

        Raises:
            InvalidModel: it is inside too many others.
        """
        if self.depth >= DEPTH_LIMIT:
            raise InvalidModel(
                f"{name!r} is inside {self.depth} sub-graphs and functions; at most {DEPTH_LIMIT} are supported"
            )
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class Importer:
    """Imports one graph; `opsets` are the versions in force in it."""

    def __init__(self, model: Model, opsets: Mapping[str, int]) -> None:
        self.model = model
        self.opsets = opsets
        self.fx = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[str, fx.Node] = {}
        self.versions: dict[tuple[str, str], int] = {}
        self.targets: set[str] = set()
        self.functions: dict[Key, fx.Node] = {}

    # ---- whole graphs

    def main(self, body: GraphProto, record: ModelRecord) -> Graph:
        """The model's graph; inputs that have an initializer are constants."""
        initialized = {tensor.name for tensor in body.initializer}
        inputs = [value for value in body.input if value.name not in initialized]
        self.inputs([value.name for value in inputs])
        self.contents(body)
        graph = self.graph(map_specs(inputs), body, record)
        record.external = self.model.external
        return graph

    def subgraph(self, body: GraphProto) -> Graph:
        """A sub-graph; its captured values become its last inputs. Sizes that it names are not the model's."""
        captures = captured_names(body)
        self.inputs([value.name for value in body.input])
        self.inputs(captures)
        self.contents(body)
        specs = (*map(_unnamed, map_specs(body.input)), *(ValueSpec(name, None, None) for name in captures))
        proto = ModelProto(ir_version=self.model.ir_version, graph=graph_header(body))
        proto.opset_import.extend(onnx.helper.make_opsetid(*item) for item in self.opsets.items())
        graph = self.graph(specs, body, ModelRecord(proto, self.model.folder))
        graph.captures = tuple(captures)
        return graph

    def function(self, proto: FunctionProto) -> Graph:
        """The body of a function; its attributes stay references."""
        self.inputs(proto.input)
        for node in proto.node:
            self.node(node)
        self.results(proto.output, f"the function {proto.name!r}")
        header = ModelProto(ir_version=self.model.ir_version, opset_import=proto.opset_import)
        inputs, outputs = (tuple(ValueSpec(name, None, None) for name in part) for part in (proto.input, proto.output))
        record = ModelRecord(header, self.model.folder)
        return Graph(self.fx, self.root, "onnx", inputs, outputs, proto.name or "function", record)

    def graph(self, inputs: tuple[ValueSpec, ...], body: GraphProto, record: ModelRecord) -> Graph:
        self.results([value.name for value in body.output], f"the graph {body.name!r}")
        return Graph(self.fx, self.root, "onnx", inputs, map_specs(body.output), body.name or "main", record)

    def inputs(self, names: Sequence[str]) -> None:
        for name in names:
            node = self.fx.placeholder(identifier(name))
            node.meta["onnx"] = InputRecord(name)
            self.values[name] = node

    def contents(self, body: GraphProto) -> None:
        for tensor in body.initializer:
            self.values[tensor.name] = self.initializer(tensor)
        for sparse in body.sparse_initializer:
            kept = onnx.SparseTensorProto.FromString(sparse.SerializeToString())
            name = sparse.values.name
            self.values[name] = self.constant(name, Opaque(kept), ConstantRecord(name, "sparse", kept))
        for node in body.node:
            self.node(node)

    def results(self, names: Sequence[str], where: str) -> None:
        missing = [name for name in names if name not in self.values]
        if missing:
            raise InvalidModel(f"the outputs {missing} of {where} are not computed by any node")
        self.fx.output(tuple(self.values[name] for name in names))

    # ---- constants

    def constant(self, name: str, value: Any, record: ConstantRecord) -> fx.Node:
        """A constant of the graph."""
        target = f"c_{identifier(name)}"
        while target in self.targets:
            target += "_"
        self.targets.add(target)
        if isinstance(value, torch.Tensor):
            self.root.register_buffer(target, value)
        else:
            setattr(self.root, target, value)
        node = self.fx.create_node("get_attr", target, name=target)
        record.tensor = value
        node.meta["onnx"] = record
        return node

    def initializer(self, tensor: TensorProto) -> fx.Node:
        if tensor.name in self.model.weights and not self.model.depth:
            record = ConstantRecord(tensor.name, "initializer", tensors.without_data(tensor), None, True)
            return self.constant(tensor.name, self.model.weights[tensor.name], record)
        value, kept, stripped = tensors.imported(tensor, self.model.folder)
        self.model.external |= tensors.is_external(tensor)
        return self.constant(tensor.name, value, ConstantRecord(tensor.name, "initializer", kept, None, stripped))

    def constant_node(self, proto: NodeProto) -> bool:
        """Import a `Constant` node as a constant; False when it is kept as an operator."""
        if len(proto.attribute) != 1 or proto.attribute[0].ref_attr_name:
            return False
        attribute = proto.attribute[0]
        value: torch.Tensor | Opaque
        if attribute.name == "value":
            value = tensors.imported(attribute.t, self.model.folder)[0]
        elif attribute.name in ("value_float", "value_floats"):
            value = torch.tensor(onnx.helper.get_attribute_value(attribute), dtype=torch.float32)
        elif attribute.name in ("value_int", "value_ints"):
            value = torch.tensor(onnx.helper.get_attribute_value(attribute), dtype=torch.int64)
        else:
            value = Opaque(proto)
        name = proto.output[0]
        self.values[name] = self.constant(name, value, ConstantRecord(name, "node", proto))
        return True

    # ---- operators

    def node(self, proto: NodeProto) -> None:
        """Append one node."""
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        kept = without_subgraphs(proto)
        if domain == "" and proto.op_type == "Constant" and self.constant_node(kept):
            return
        arguments = tuple(self.value(name, proto) if name else None for name in proto.input)
        attributes: dict[str, Any] = {}
        for attribute, stored in zip(proto.attribute, kept.attribute, strict=True):
            attributes[attribute.name] = self.attribute(kept, attribute, stored)
        captured = dict.fromkeys(name for graph in graphs_of(proto) for name in captured_names(graph))
        if domain == gradient.DOMAIN and proto.op_type == "Gradient":
            attributes["_graph"], captured = gradient.differentiated(self, proto)
        if captured:
            attributes[CAPTURED] = tuple(self.value(name, proto) for name in captured)
            attributes[CAPTURED_NAMES] = tuple(captured)
        function = called(self.model, proto, domain, self.opsets, Importer)
        if function is not None:
            attributes[FUNCTION] = self.function_constant(function)
            attributes[DEFAULTS] = function.defaults
        if len(proto.output) != 1:
            attributes["_outputs"] = len(proto.output)
        target = OnnxOp(domain, proto.op_type, self.version(domain, proto.op_type))
        self.operator(kept, target, arguments, attributes)

    def operator(
        self, proto: NodeProto, target: OnnxOp, arguments: tuple[Any, ...], attributes: dict[str, Any]
    ) -> None:
        label = proto.name or next(filter(None, proto.output), proto.op_type)
        node = self.fx.create_node("call_function", target, arguments, attributes, name=identifier(label))
        node.meta["onnx"] = NodeRecord(proto.name, tuple(proto.output), proto, target, node.kwargs)
        node.meta["provenance"] = (label,)
        if (mark := marks.read(proto)) is not None:
            node.meta["sparsity"] = mark
        if len(proto.output) == 1:
            self.values[proto.output[0]] = node
            return
        for index, name in enumerate(proto.output):
            if name:
                self.values[name] = self.fx.create_node(
                    "call_function", operator.getitem, (node, index), name=identifier(name)
                )

    def attribute(self, node: NodeProto, attribute: AttributeProto, stored: AttributeProto) -> Any:
        """The keyword's value; `stored` is the message without sub-graphs."""
        kind = attribute.type
        if attribute.ref_attr_name:
            return AttributeReference(attribute.ref_attr_name)
        if kind in PLAIN:
            return plain_value(attribute)
        name = f"{node.name or node.output[0]}_{attribute.name}"
        if kind == AttributeProto.GRAPH:
            return self.constant(name, self.body(attribute.g), ConstantRecord(name, "attribute", stored))
        if kind == AttributeProto.GRAPHS:
            records = [ConstantRecord(name, "attribute", stored) for _ in attribute.graphs]
            bodies = map(self.body, attribute.graphs)
            return tuple(self.constant(name, body, record) for body, record in zip(bodies, records, strict=True))
        value: torch.Tensor | Opaque = Opaque(stored)
        if kind == AttributeProto.TENSOR and attribute.t.data_type in TO_TORCH:
            value = tensors.imported(attribute.t, self.model.folder)[0]
        return self.constant(name, value, ConstantRecord(name, "attribute", stored))

    def body(self, proto: GraphProto) -> Graph:
        with self.model.deeper(proto.name):
            return Importer(self.model, self.opsets).subgraph(proto)

    def function_constant(self, function: Function) -> fx.Node:
        """The constant that holds a function: one for all of its calls in this graph."""
        if function.key not in self.functions:
            name = "_".join(("function", *filter(None, function.key)))
            self.functions[function.key] = self.constant(name, function.graph, ConstantRecord(name, "attribute", None))
        return self.functions[function.key]

    def version(self, domain: str, op_type: str) -> int:
        """Since-version of the schema in force; the opset version for operators without a schema."""
        key = (domain, op_type)
        if key not in self.versions:
            opset = self.opsets.get(domain, 1)
            known = onnx.defs.has(op_type, opset, domain)
            self.versions[key] = onnx.defs.get_schema(op_type, opset, domain).since_version if known else opset
        return self.versions[key]

    def value(self, name: str, user: NodeProto) -> fx.Node:
        """The node of a value.

        Raises:
            InvalidModel: nothing before the user computes it.
        """
        if name not in self.values:
            raise InvalidModel(
                f"node {user.name or user.op_type!r} uses the value {name!r}, which nothing before it computes"
            )
        return self.values[name]


def map_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[ValueSpec, ...]:
    """Signature entries."""
    return tuple(map(value_spec, values))


def _unnamed(spec: ValueSpec) -> ValueSpec:
    if spec.shape is None:
        return spec
    return ValueSpec(spec.name, spec.dtype, tuple(dim if isinstance(dim, int) else None for dim in spec.shape))


def identifier(name: str) -> str:
    """A Python identifier near `name` (fx makes it unique)."""
    text = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in name) or "value"
    return f"_{text}" if text[0].isdigit() else text
