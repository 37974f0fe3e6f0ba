"""Types of values that neither the file nor a torch reference tells, by ONNX's own shape inference.

`ir.shapes` runs references on fake tensors. Behind an operator that has none it must rely on what the file declares;
where the file declares nothing, ONNX's inference (which knows the standard operators, sub-graphs and functions) does.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.onnx import registry
from fxopt.ir.onnx.export import outline
from fxopt.ir.onnx.signature import value_spec

_SMALL = 1024  # bytes; larger initializers are no shapes, and are left out of what the inference sees


def undeclared_types(proto: ModelProto) -> dict[str, ValueSpec]:
    """The inferred types of undeclared values behind operators without a torch reference, or behind strings.

    {} where there are none: fake tensors then tell all types, and the inference is not run.

    The message is not changed. Inference that fails infers nothing.
    """
    body = proto.graph
    declared = {value.name for value in (*body.value_info, *body.output)}
    strings = any(value.type.tensor_type.elem_type == TensorProto.STRING for value in body.input)
    wanted = {
        name
        for node in body.node
        if strings or registry.lookup("" if node.domain == "ai.onnx" else node.domain, node.op_type) is None
        for name in node.output
        if name and name not in declared
    }
    if not wanted:
        return {}
    try:
        inferred = onnx.shape_inference.infer_shapes(_light(proto), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    specs = {value.name: value_spec(value) for value in inferred.graph.value_info if value.name in wanted}
    return {name: spec for name, spec in specs.items() if spec.dtype is not None and spec.shape is not None}


def type_fault(graph: Graph) -> str:
    """What ONNX's inference finds wrong with an ONNX graph as it would be written; "" when types and shapes agree.

    Raises:
        Unsupported: the graph holds an operator without an ONNX form.
    """
    proto, weights = outline(graph)
    try:
        onnx.shape_inference.infer_shapes(_light(proto, weights), check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split()).removeprefix("[ShapeInferenceError] Inference error(s): ")[:300]
    return ""


def _light(proto: ModelProto, elsewhere: Collection[str] = ()) -> ModelProto:
    """The model with the types of its large initializers, and of those whose bytes are elsewhere, but without bytes."""
    light = ModelProto()
    for entry in proto.opset_import:
        light.opset_import.add().CopyFrom(entry)
    light.ir_version = proto.ir_version
    light.functions.extend(proto.functions)
    body: GraphProto = light.graph
    body.name = proto.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(body, field).extend(getattr(proto.graph, field))
    known = {value.name for value in body.input}
    for tensor in proto.graph.initializer:
        beside = tensor.name in elsewhere or tensor.data_location == TensorProto.EXTERNAL
        if tensor.ByteSize() <= _SMALL and not beside:
            body.initializer.add().CopyFrom(tensor)
        elif tensor.name not in known:
            body.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light
