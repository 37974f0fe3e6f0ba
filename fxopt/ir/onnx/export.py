"""From the ONNX dialect to a `ModelProto`: untouched nodes verbatim, fxopt operators through a table of forms."""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import fx

from fxopt.errors import OutputError, Unsupported
from fxopt.ir.graph import Graph, Opaque, label, provenance
from fxopt.ir.onnx.dtypes import FROM_TORCH, to_numpy
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ConstantRecord, NodeRecord

Form = Callable[["Emitter", fx.Node], "str | tuple[str, ...]"]
Forms = Mapping[Any, Form]
INLINE_LIMIT = 1_900_000_000  # bytes of weights up to which one file is written (protobuf's limit is 2^31 - 1)
_HIDDEN = ("_outputs", "_captured", "_captured_names")


class Emitter:
    """Collects nodes and initializers; a form calls `value`, `node` and `initializer`."""

    def __init__(self, graph: Graph, forms: Forms) -> None:
        assert graph.model is not None
        self.graph = graph
        self.forms = forms
        self.opsets = graph.model.opsets
        self.keeps_metadata = graph.model.proto.ir_version >= 10
        self.nodes: list[NodeProto] = []
        self.initializers: list[tuple[TensorProto, torch.Tensor | None]] = []
        self.sparse: list[Any] = []
        self.names: dict[fx.Node, str | tuple[str, ...]] = {}
        self.shared: dict[Any, Any] = {}  # for forms: values that several nodes share, such as a quantized input
        self.renamed = self._output_names()
        self._used = self._reserved()
        self._counts: dict[str, int] = {}
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

    def _reserved(self) -> set[str]:
        assert self.graph.model is not None
        body = self.graph.model.proto.graph
        used = {value.name for value in (*body.input, *body.output, *body.value_info)}
        for node in self.graph.fx.nodes:
            record = node.meta.get("onnx")
            if isinstance(record, NodeRecord):
                used.update(record.outputs)
                used.update((record.name, *(record.proto.input if record.proto is not None else ())))
            elif isinstance(record, ConstantRecord):
                used.add(record.name)
        return used

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
                self.names[node] = node.meta["onnx"].name
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
            self.initializers.append((proto, record.tensor if record.stripped else None))

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
        self.nodes.append(proto)
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
        if list(proto.input) == inputs and list(proto.output) == outputs and same_attributes and same_constants:
            return proto
        adapted: NodeProto = NodeProto.FromString(proto.SerializeToString())
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

    def _attribute_unchanged(self, node: fx.Node) -> bool:
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
        if not self.keeps_metadata or self._current is None:
            return
        source, *passes = provenance(self._current)
        proto.metadata_props.add(key="fxopt.from", value=source)
        if passes:
            proto.metadata_props.add(key="fxopt.pass", value=passes[-1])


def _code(kind: Any) -> int:
    """The number of an attribute type (the bindings' enumeration has no public type)."""
    return int(kind.value)


def _plain(value: torch.Tensor) -> Any:
    """The bytes as numpy holds them."""
    return to_numpy(value)


def _kept(before: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether an attribute has the value that it had at import; a copy of the graph has nodes of its own."""
    old = before.get(name)
    if isinstance(old, fx.Node) and isinstance(value, fx.Node):
        return old is value or (old.op == value.op == "get_attr" and old.target == value.target)
    return name in before and (old is value or old == value)


def _emit(graph: Graph, forms: Forms) -> tuple[ModelProto, list[tuple[TensorProto, torch.Tensor]]]:
    """The model message, and the initializers of it that still lack their bytes."""
    if graph.model is None:
        raise Unsupported("only a graph of ONNX origin can be written as it is; export a PyTorch graph first")
    emitter = Emitter(graph, forms)
    emitter.run()
    proto = ModelProto.FromString(graph.model.proto.SerializeToString())
    proto.graph.node.extend(emitter.nodes)
    proto.graph.sparse_initializer.extend(emitter.sparse)
    pending = []
    for tensor, value in emitter.initializers:
        proto.graph.initializer.append(tensor)
        if value is not None:
            pending.append((proto.graph.initializer[-1], value))
    known = {"" if entry.domain == "ai.onnx" else entry.domain for entry in proto.opset_import}
    for domain, version in emitter.opsets.items():
        if domain not in known:
            proto.opset_import.append(helper.make_opsetid(domain, version))
    live = {name for node in proto.graph.node for name in node.output}
    live.update(tensor.name for tensor in proto.graph.initializer)
    live.update(value.name for value in proto.graph.input)
    live.update(() if graph.model is None else graph.model.dangling)
    if any(value.name not in live for value in proto.graph.value_info):
        kept = [value for value in proto.graph.value_info if value.name in live]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    return proto, pending


def to_model(graph: Graph, forms: Forms | None = None) -> ModelProto:
    """The graph as a `ModelProto`; external tensors of the source stay references to its files.

    Raises:
        Unsupported: an operator has no ONNX form, or the weights do not fit into one message (use `save`).
    """
    proto, pending = _emit(graph, forms or {})
    pending = [(tensor, value) for tensor, value in pending if tensor.data_location != TensorProto.EXTERNAL]
    total = sum(value.nbytes for _, value in pending)
    if total > INLINE_LIMIT:
        raise Unsupported(f"{total} bytes of weights do not fit into one protobuf message; save the graph to a file")
    for tensor, value in pending:
        tensor.raw_data = to_numpy(value).tobytes()
    return proto


def save(
    graph: Graph, path: str | os.PathLike[str], forms: Forms | None = None, *, external: bool | None = None
) -> None:
    """Write the graph as `path`, with its weights in `path`.data when they exceed one message or the source did so.

    Written to temporary names and renamed: nothing half-written is left, an existing file stays until the end.

    Raises:
        OutputError: the path is a folder, its folder does not exist, or writing fails.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file, such as {path / 'model.onnx'}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    proto, pending = _emit(graph, forms or {})
    total = sum(value.nbytes for _, value in pending)
    if external is None:
        external = total > INLINE_LIMIT or (graph.model is not None and graph.model.external)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written = Path(scratch) / path.name
            data = Path(scratch) / f"{path.name}.data"
            if external:
                _write_external(pending, Path(scratch), data.name)
            else:
                for tensor, value in pending:
                    tensor.ClearField("external_data")
                    tensor.ClearField("data_location")
                    tensor.raw_data = to_numpy(value).tobytes()
            written.write_bytes(proto.SerializeToString(deterministic=True))
            if data.exists():
                os.replace(data, path.parent / data.name)
            os.replace(written, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_external(pending: list[tuple[TensorProto, torch.Tensor]], folder: Path, name: str) -> None:
    """Stream the tensors to one data file and refer to it."""
    tensors = [onnx_ir.Tensor(_plain(value), name=tensor.name) for tensor, value in pending]
    placed = onnx_ir.external_data.convert_tensors_to_external(tensors, folder, name)
    for (tensor, _), where in zip(pending, placed, strict=True):
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", where.offset), ("length", where.length)):
            tensor.external_data.add(key=key, value=str(value))
