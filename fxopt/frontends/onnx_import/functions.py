"""Functions: those of the model, and the bodies that schemas give to operators without a reference of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto

from fxopt.errors import InvalidModel
from fxopt.ir.graph import Graph
from fxopt.ir.onnx import registry

if TYPE_CHECKING:
    from fxopt.frontends.onnx_import.importer import Importer, Model

Key = tuple[str, str, str]  # domain, name, overload
PLAIN = frozenset(
    {
        AttributeProto.INT,
        AttributeProto.FLOAT,
        AttributeProto.STRING,
        AttributeProto.INTS,
        AttributeProto.FLOATS,
        AttributeProto.STRINGS,
    }
)


@dataclass(frozen=True)
class Function:
    """An imported function: its graph, with references to attributes, and the attributes' defaults."""

    key: Key
    graph: Graph
    defaults: dict[str, Any]


def plain_value(attribute: AttributeProto) -> Any:
    """An attribute that is a number, a text or a list of them."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if attribute.type == AttributeProto.STRINGS:
        return [item.decode("utf-8", "surrogateescape") for item in attribute.strings]
    return value if isinstance(value, (int, float)) else list(value)


def key_of(domain: str, name: str, overload: str) -> Key:
    """The key of a function."""
    return "" if domain == "ai.onnx" else domain, name, overload


def called(
    model: Model, node: NodeProto, domain: str, opsets: Mapping[str, int], importer: type[Importer]
) -> Function | None:
    """The function that a node calls, imported once; None for an operator.

    Raises:
        InvalidModel: a function calls itself, or functions call each other too deeply.
    """
    key = key_of(domain, node.op_type, node.overload)
    if key in model.functions:
        proto = model.functions[key]
        defaults = {item.name: _default(proto, item) for item in proto.attribute_proto}
    else:
        schema = _schema(domain, node.op_type, opsets.get(domain, 1))
        if schema is None:
            return None
        proto = FunctionProto.FromString(schema.function_body.SerializeToString())
        key = (domain, node.op_type, f"since {schema.since_version}")
        given = {name: item.default_value for name, item in schema.attributes.items()}
        defaults = {name: plain_value(item) for name, item in given.items() if item.type in PLAIN}
    if key not in model.imported:
        model.imported[key] = Function(key, _graph(model, key, proto, opsets, importer), defaults)
    return model.imported[key]


def _schema(domain: str, name: str, opset: int) -> Any:
    """The schema of an operator that has a body there and no reference; else None."""
    if registry.lookup(domain, name) is not None or not onnx.defs.has(name, opset, domain):
        return None
    schema: Any = onnx.defs.get_schema(name, opset, domain)
    return schema if schema.has_function else None


def _graph(model: Model, key: Key, proto: FunctionProto, opsets: Mapping[str, int], importer: type[Importer]) -> Graph:
    calls = [*model.calling, key]
    if key in model.calling:
        shown = " -> ".join("::".join(filter(None, item)) for item in calls[model.calling.index(key) :])
        raise InvalidModel(f"the function {proto.name!r} of domain {proto.domain!r} calls itself: {shown}")
    own = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in proto.opset_import}
    model.calling.append(key)
    try:
        with model.deeper(proto.name):
            return importer(model, own or opsets).function(proto)
    finally:
        model.calling.pop()


def _default(proto: FunctionProto, attribute: AttributeProto) -> Any:
    if attribute.type not in PLAIN:
        kind = AttributeProto.AttributeType.Name(attribute.type)
        raise InvalidModel(
            f"function {proto.name!r}: the default of attribute {attribute.name!r} is a {kind}; "
            "expected a number or text"
        )
    return plain_value(attribute)
