"""Graph to ONNX nodes: untouched ones verbatim, changed ones from their record, fxopt operators through forms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, Opaque, label, provenance
from fxopt.ir.onnx import marks
from fxopt.ir.onnx.dtypes import FROM_TORCH, to_numpy
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ConstantRecord, NodeRecord
from fxopt.ir.onnx.signature import value_info
from fxopt.ir.onnx.tensor_bytes import external_bytes

Form = Callable[["Emitter", fx.Node], "str | tuple[str, ...]"]
Forms = Mapping[Any, Form]
_HIDDEN = ("_outputs", "_captured", "_captured_names", "_function", "_defaults", "_graph")


class Emitter:
    """Collects nodes and initializers; a form calls `value`, `node` and `initializer`.

    Args:
        around: the emitter of the graph around a body, whose names and operator sets are the body's too.
        inline: write external tensors of bodies into the message.
    """

    def __init__(self, graph: Graph, forms: Forms, *, around: Emitter | None = None, inline: bool = False) -> None:
        assert graph.model is not None or around is not None
        self.graph = graph
        self.forms = forms
        self.inline = inline
        self.opsets: dict[str, int] = around.opsets if around is not None else graph.model.opsets  # type: ignore[union-attr]
        self.keeps_metadata: bool = (
            around.keeps_metadata
            if around is not None
            else graph.model.proto.ir_version >= marks.IR_VERSION or marks.has_marks(graph)  # type: ignore[union-attr]
        )
        self.nodes: list[NodeProto] = []
        self.initializers: list[tuple[TensorProto, torch.Tensor | None]] = []
        self.sparse: list[Any] = []
        self.names: dict[fx.Node, str | tuple[str, ...]] = {}
        self.shared: dict[Any, Any] = {}  # for forms: values that several nodes share, such as a quantized input
        self.renamed = self._output_names()
        self._used: set[str] = around._used if around is not None else _reserved(graph)
        self._counts: dict[str, int] = around._counts if around is not None else {}
        self._current: fx.Node | None = None

    # ---- what forms use

    def value(self, argument: Any) -> str:
        """The ONNX name of an argument; "" for None."""
        if argument is None:
            return ""
        if argument not in self.names and argument.op == "get_attr":
            constant = self.graph.attribute(str(argument.target))
            self.names[argument] = self.initializer(constant, str(argument.target).removeprefix("k_"))
        name = self.names[argument]
        assert isinstance(name, str), f"{argument} has several outputs; use getitem"
        return name

    def output(self, node: fx.Node) -> str:
        """The name for the value of `node`: that of the value it replaced, else a new one."""
        if node in self.renamed:
            return self.renamed[node]
        record = node.meta.get("onnx")
        if isinstance(record, NodeRecord) and len(record.outputs) == 1 and record.outputs[0]:
            return record.outputs[0]
        return self.fresh(node.name)

    def node(
        self, op_type: str, inputs: list[str], outputs: list[str], domain: str = "", name: str = "", **attributes: Any
    ) -> None:
        """Append a node; its name comes from the first output when none is given."""
        proto = helper.make_node(
            op_type, inputs, outputs, name=self.fresh(name or f"{outputs[0]}/{op_type}"), domain=domain, **attributes
        )
        if domain not in self.opsets:
            self.opsets[domain] = 1
        self._sign(proto)
        self.nodes.append(proto)

    def initializer(self, value: torch.Tensor | Opaque, hint: str) -> str:
        """A new initializer; returns its name."""
        name = self.fresh(hint)
        if isinstance(value, Opaque):
            proto = TensorProto.FromString(value.proto.SerializeToString())
            proto.name = name
            self.initializers.append((proto, None))
            return name
        proto = TensorProto(name=name, data_type=FROM_TORCH[value.dtype], dims=list(value.shape))
        self.initializers.append((proto, value))
        return name

    def fresh(self, hint: str) -> str:
        """A name that nothing else in the model has."""
        name = hint
        while name in self._used:
            self._counts[hint] = self._counts.get(hint, 0) + 1
            name = f"{hint}_{self._counts[hint]}"
        self._used.add(name)
        return name

    # ---- the graph

    def _output_names(self) -> dict[fx.Node, str]:
        """Nodes whose value must take the name of a graph output."""
        renamed: dict[fx.Node, str] = {}
        for spec, node in zip(self.graph.outputs, self.graph.result_nodes, strict=True):
            if node.op == "call_function" and node not in renamed:
                renamed[node] = spec.name
        return renamed

    def run(self) -> None:
        """Emit every node."""
        for node in self.graph.fx.nodes:
            self._current = node
            if node.op == "placeholder":
                record = node.meta.get("onnx")
                self.names[node] = record.name if record is not None else self.fresh(node.name)
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
        for spec, node in zip(self.graph.outputs, self.graph.result_nodes, strict=True):
            if self.value(node) != spec.name:
                self.node("Identity", [self.value(node)], [spec.name])

    def _constant(self, node: fx.Node) -> None:
        record = node.meta.get("onnx")
        if not isinstance(record, ConstantRecord) or record.kind == "attribute":
            return  # written where it is used
        value = self.graph.attribute(str(node.target))
        self.names[node] = record.name
        if record.proto is not None and value is record.tensor:
            self._untouched(record, record.proto)
        elif isinstance(value, torch.Tensor):
            proto = TensorProto(name=record.name, data_type=FROM_TORCH[value.dtype], dims=list(value.shape))
            self.initializers.append((proto, value))
        else:
            raise Unsupported(f"constant {record.name!r} was changed to a value that has no ONNX form")

    def _untouched(self, record: ConstantRecord, proto: Any) -> None:
        if record.kind == "sparse":
            self.sparse.append(proto)
        elif record.kind == "node":
            self.nodes.append(proto)
        else:
            value = record.tensor if record.stripped else None
            if isinstance(value, Opaque):  # of a type that torch lacks, in another file
                value = external_bytes(proto, None if self.graph.model is None else self.graph.model.folder)
            self.initializers.append((proto, value))

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target is operator.getitem:
            source, index = node.args
            names = self.names[source]  # type: ignore[index]
            self.names[node] = names[index]  # type: ignore[index]
        elif isinstance(target, OnnxOp):
            self.names[node] = self._onnx_node(node, target)
        elif target in self.forms:
            self.names[node] = self.forms[target](self, node)
        else:
            raise Unsupported(f"node {label(node)!r}: operator {target} has no ONNX form")

    def _onnx_node(self, node: fx.Node, target: OnnxOp) -> str | tuple[str, ...]:
        count = int(node.kwargs.get("_outputs", 1))  # type: ignore[arg-type]
        record = node.meta.get("onnx")
        outputs = self._outputs(node, record if isinstance(record, NodeRecord) else None, count)
        inputs = [self.value(argument) for argument in node.args]
        self._restore_captured(node)
        proto = record.proto if isinstance(record, NodeRecord) else None
        if proto is not None and isinstance(record, NodeRecord) and record.target is target:
            proto = self._adapted(proto, record, node, inputs, outputs)
        else:
            name = self.fresh(f"{outputs[0]}/{target.op_type}")
            proto = NodeProto(op_type=target.op_type, domain=target.domain, name=name)
            proto.input.extend(inputs)
            proto.output.extend(outputs)
            proto.attribute.extend(self._attributes(node, target, {}))
            if target.domain not in self.opsets:
                self.opsets[target.domain] = 1
            self._sign(proto)
        self.nodes.append(self._with_bodies(proto, node))
        return outputs[0] if count == 1 else tuple(outputs)

    def _outputs(self, node: fx.Node, record: NodeRecord | None, count: int) -> list[str]:
        names = list(record.outputs) if record is not None and len(record.outputs) == count else []
        if not names:
            names = [self.fresh(node.name if index == 0 else f"{node.name}_{index}") for index in range(count)]
        if count == 1:
            return [self.renamed.get(node, names[0])]
        for user in node.users:
            if user.target is operator.getitem and user in self.renamed:
                names[user.args[1]] = self.renamed[user]  # type: ignore[index]
        return names

    def _adapted(
        self, proto: NodeProto, record: NodeRecord, node: fx.Node, inputs: list[str], outputs: list[str]
    ) -> NodeProto:
        """The node's message with new inputs, outputs and attributes where they differ; itself when nothing does."""
        same_attributes = node.kwargs.keys() == record.kwargs.keys() and all(
            name == "_captured" or _kept(record.kwargs, name, value) for name, value in node.kwargs.items()
        )
        same_constants = all(
            self._attribute_unchanged(value) for value in node.kwargs.values() if isinstance(value, fx.Node)
        )
        same_names = list(proto.input) == inputs and list(proto.output) == outputs
        if same_names and same_attributes and same_constants and marks.is_written(proto, node):
            return proto
        adapted: NodeProto = NodeProto.FromString(proto.SerializeToString())
        marks.write(adapted, node)
        del adapted.input[:], adapted.output[:]
        adapted.input.extend(inputs)
        adapted.output.extend(outputs)
        if not (same_attributes and same_constants):
            known = {attribute.name: attribute for attribute in proto.attribute}
            del adapted.attribute[:]
            old = {
                name: known[name]
                for name, value in node.kwargs.items()
                if _kept(record.kwargs, name, value) and name in known
            }
            adapted.attribute.extend(self._attributes(node, node.target, old))
        return adapted

    def _with_bodies(self, proto: NodeProto, node: fx.Node) -> NodeProto:
        """The message with the sub-graphs as they are now; itself when there are none."""
        bodies = {name: self._bodies(value) for name, value in node.kwargs.items() if not name.startswith("_")}
        if not any(bodies.values()):
            return proto
        whole: NodeProto = NodeProto.FromString(proto.SerializeToString())
        for attribute in whole.attribute:
            for body in bodies.get(attribute.name, ()):
                held = attribute.g if attribute.type == AttributeProto.GRAPH else attribute.graphs.add()
                held.CopyFrom(self.body(body))
        return whole

    def _bodies(self, value: Any) -> list[Graph]:
        items = value if isinstance(value, (list, tuple)) else (value,)
        nodes = [item for item in items if isinstance(item, fx.Node) and item.op == "get_attr"]
        found = [self.graph.attribute(str(item.target)) for item in nodes]
        return [body for body in found if isinstance(body, Graph)]

    def body(self, graph: Graph) -> GraphProto:
        """The message of a body; names that it does not share are not those of another graph of the model."""
        inside = Emitter(graph, self.forms, around=self, inline=self.inline)
        inside.run()
        proto = _header(graph, inside)
        proto.node.extend(inside.nodes)
        proto.sparse_initializer.extend(inside.sparse)
        for tensor, value in inside.initializers:
            kept = proto.initializer.add()
            kept.CopyFrom(tensor)
            if value is None or (kept.data_location == TensorProto.EXTERNAL and not self.inline):
                continue
            kept.ClearField("external_data")
            kept.ClearField("data_location")
            kept.raw_data = to_numpy(value).tobytes()
        drop_stale_types(proto)
        return proto

    def _attribute_unchanged(self, node: fx.Node) -> bool:
        if self._bodies(node):
            return True  # they are always written as they are
        record = node.meta.get("onnx")
        return isinstance(record, ConstantRecord) and self.graph.attribute(str(node.target)) is record.tensor

    def _attributes(self, node: fx.Node, target: Any, old: Mapping[str, AttributeProto]) -> list[AttributeProto]:
        made = []
        for name, value in node.kwargs.items():
            if name in _HIDDEN or value is None:
                continue
            if name in old and not (isinstance(value, fx.Node) and not self._attribute_unchanged(value)):
                made.append(old[name])
            else:
                made.append(self._attribute(target, name, value))
        return made

    def _attribute(self, target: OnnxOp, name: str, value: Any) -> AttributeProto:
        if self._bodies(value):
            several = isinstance(value, (list, tuple))
            return AttributeProto(name=name, type=AttributeProto.GRAPHS if several else AttributeProto.GRAPH)
        if isinstance(value, fx.Node):
            constant = self.graph.attribute(str(value.target))
            if isinstance(constant, Opaque):
                return constant.proto  # type: ignore[no-any-return]
            return helper.make_attribute(name, numpy_helper.from_array(to_numpy(constant)))
        if isinstance(value, (list, tuple)) and not value:
            schema = onnx.defs.get_schema(target.op_type, target.since_version, target.domain)
            return helper.make_attribute(name, list(value), attr_type=_code(schema.attributes[name].type))
        if isinstance(value, str):
            return helper.make_attribute(name, value.encode("utf-8", "surrogateescape"))
        return helper.make_attribute(name, list(value) if isinstance(value, tuple) else value)

    def _restore_captured(self, node: fx.Node) -> None:
        """A value that a sub-graph refers to by name keeps that name."""
        captured: Any = node.kwargs.get("_captured", ())
        for argument, name in zip(captured, node.kwargs.get("_captured_names", ()), strict=True):  # type: ignore[arg-type]
            if self.value(argument) != name and ("captured", name) not in self.shared:
                self.shared["captured", name] = True
                self.node("Identity", [self.value(argument)], [str(name)])

    def _sign(self, proto: NodeProto) -> None:
        """Say where a new node comes from: in its metadata, or in its doc string where the IR version has none."""
        if self._current is None:
            return
        source, *passes = provenance(self._current)
        if not self.keeps_metadata:
            proto.doc_string = f"fxopt.from: {source}" + (f", fxopt.pass: {passes[-1]}" if passes else "")
            return
        proto.metadata_props.add(key="fxopt.from", value=source)
        if passes:
            proto.metadata_props.add(key="fxopt.pass", value=passes[-1])
        marks.write(proto, self._current)


def _code(kind: Any) -> int:
    """The number of an attribute type (the bindings' enumeration has no public type)."""
    return int(kind.value)


def _kept(before: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether an attribute has the value that it had at import; a copy of the graph has nodes of its own."""
    return name in before and _same(before[name], value)


def _same(old: Any, value: Any) -> bool:
    if isinstance(old, fx.Node) and isinstance(value, fx.Node):
        return old is value or (old.op == value.op == "get_attr" and old.target == value.target)
    if isinstance(old, tuple) and isinstance(value, tuple) and any(isinstance(item, fx.Node) for item in old):
        return len(old) == len(value) and all(map(_same, old, value))
    return old is value or bool(old == value)


def _reserved(graph: Graph) -> set[str]:
    """All names that the file has, in bodies too."""
    used: set[str] = set()
    for part in (graph, *(found.graph for found in graph.subgraphs())):
        if part.model is not None:
            body = part.model.proto.graph
            used.update(value.name for value in (*body.input, *body.output, *body.value_info))
        for node in part.fx.nodes:
            record = node.meta.get("onnx")
            if isinstance(record, NodeRecord):
                used.update(record.outputs)
                used.update((record.name, *(record.proto.input if record.proto is not None else ())))
            elif isinstance(record, ConstantRecord):
                used.add(record.name)
    return used


def _header(graph: Graph, inside: Emitter) -> GraphProto:
    """Names, inputs, outputs and declared types of a body: as imported, else from its signature."""
    if graph.model is not None:
        return GraphProto.FromString(graph.model.proto.graph.SerializeToString())
    given = graph.placeholders[: len(graph.inputs) - len(graph.captures)]
    inputs = [value_info(spec, str(inside.names[node])) for node, spec in zip(given, graph.inputs, strict=False)]
    return GraphProto(name=graph.name, input=inputs, output=[value_info(spec, spec.name) for spec in graph.outputs])


def drop_stale_types(proto: GraphProto, dangling: frozenset[str] = frozenset()) -> None:
    """Remove the declared types of values that the graph no longer has; `dangling` are names it never had."""
    live = {name for node in proto.node for name in node.output}
    live.update(tensor.name for tensor in proto.initializer)
    live.update(value.name for value in proto.input)
    live |= dangling
    if any(value.name not in live for value in proto.value_info):
        kept = [value for value in proto.value_info if value.name in live]
        del proto.value_info[:]
        proto.value_info.extend(kept)


def with_bodies(graph: Graph, node: fx.Node, proto: NodeProto) -> NodeProto:
    """The message of a node with its sub-graphs, for evaluators of single nodes."""
    if not any(found.owner is node for found in graph.subgraphs(recursive=False)):
        return proto
    return Emitter(graph, {}, inline=True)._with_bodies(proto, node)
