"""A model at a newer version of the ONNX operator set: node by node, and verified by running both.

ONNX's own converter takes whole models, and refuses those with functions or operators of other domains. Here it sees
one node at a time: a node whose operator did not change between the versions is kept as it is, byte for byte, one that
did is converted alone and put in its place; operators of other domains, functions and sub-graphs stay.

Longer than most files here: whether a node may be kept, and how that is proved, are one argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fxopt.errors import InvalidModel, InvalidOption, Unsupported, VerificationError
from fxopt.frontends.comparison import first_line, made_up, noise_to_signal, run
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.tensor_bytes import byte_count
from fxopt.ir.onnx.walk import graphs_of

_SMALL = 1024  # bytes; constants below are shown to the converter, which may turn them into attributes or back
_SAME_MEANING = {"If", "Loop"}  # their versions differ in element types only
_TOLERANCE = 1e-10  # noise to signal: both are run with the same definitions, so only orders of sums may differ


@dataclass(frozen=True)
class Conversion:
    """A converted model, what was changed in it, and what the comparison said."""

    model: ModelProto
    source: int
    target: int
    changed: tuple[str, ...]  # "node: Operator-11 became Operator-13", for nodes that were rewritten
    error: float | None = None  # largest noise to signal of an output; None: not compared
    remark: str = ""  # why the two could not be compared
    unchanged: bool = False  # the operators are the same in both versions, so that nothing had to be compared

    def __str__(self) -> str:
        if self.source == self.target:
            return f"the model is at opset {self.target} already"
        if self.unchanged:
            return f"converted from opset {self.source} to {self.target}: every operator stays what it is"
        nodes = f"{len(self.changed)} nodes rewritten" if len(self.changed) != 1 else "1 node rewritten"
        proof = f"not verified: {self.remark}" if self.error is None else f"verified, noise to signal {self.error:.1e}"
        return f"converted from opset {self.source} to {self.target}: {nodes}; {proof}"


@dataclass
class _Scope:
    """What conversion of one graph or function needs to know."""

    source: int
    target: int
    types: dict[str, ValueInfoProto]
    constants: dict[str, TensorProto]
    changed: list[str]
    doubtful: list[str]  # nodes that are kept although their operator changed: only a comparison can tell
    names: set[str]
    initializers: list[TensorProto] = field(default_factory=list)  # new ones

    def fresh(self, name: str) -> str:
        """A value name that is not in use."""
        free, count = name, 0
        while free in self.names:
            count += 1
            free = f"{name}_{count}"
        self.names.add(free)
        return free


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set that the model imports."""
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not found:
        raise InvalidModel("the model imports no version of the ONNX operator set")
    return int(found[0])


def convert(
    model: ModelProto, opset: int, *, inputs: Sequence[torch.Tensor] | None = None, verify: bool = True
) -> Conversion:
    """The model at `opset`; the given message is not changed.

    Args:
        inputs: what both models are run on; None: numbers made up from the types of the inputs.
        verify: compare the two, in torch, or in ONNX Runtime where an operator has no torch reference.

    Raises:
        InvalidOption: the version is older than the model's, or unknown to the installed ONNX.
        Unsupported: a node cannot be converted.
        VerificationError: the result computes something else.
    """
    result, doubtful = rewritten(model, opset)
    if result.model is model:
        return result
    if verify and not result.changed and not doubtful:
        result = replace(result, error=0.0, unchanged=True)
    elif verify:
        result = verified(load(model, check=False), load(result.model), result, inputs)
    refuse_doubtful(result, doubtful)
    return result


def rewritten(model: ModelProto, opset: int) -> tuple[Conversion, list[str]]:
    """The model at `opset`, and the nodes that were kept although their operator changed: only a run can judge them.

    The bytes of initializers of 1 KB or more are not looked at.

    Raises: as `convert`; nothing is run.
    """
    source = opset_of(model)
    latest = onnx.defs.onnx_opset_version()
    if not source <= opset <= latest:
        raise InvalidOption(
            f"opset {opset}: the model is at opset {source} and the installed ONNX knows {latest}; "
            f"expected {source} to {latest} (models are converted upwards only)"
        )
    if source == opset:
        return Conversion(model, source, opset, ()), []
    made = ModelProto()
    made.CopyFrom(model)
    changed: list[str] = []
    doubtful: list[str] = []
    _convert_graph(made.graph, _scope_of(model, opset, changed, doubtful))
    for function in made.functions:
        own = [entry for entry in function.opset_import if entry.domain in ("", "ai.onnx")]
        names = {name for node in function.node for name in (*node.input, *node.output)} | set(function.input)
        scope = _Scope(int(own[0].version) if own else source, opset, {}, {}, changed, doubtful, names)
        nodes = _convert_nodes(function.node, scope)
        nodes = [*(_constant_node(tensor) for tensor in scope.initializers), *nodes]
        del function.node[:]
        function.node.extend(nodes)
        for entry in own:
            entry.version = opset
    for entry in made.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    made.ir_version = max(made.ir_version, helper.find_min_ir_version_for(list(made.opset_import), ignore_unknown=True))
    return Conversion(made, source, opset, tuple(changed)), doubtful


def refuse_doubtful(result: Conversion, doubtful: Sequence[str]) -> None:
    """Refuse what was not compared, where only a comparison can tell.

    Raises:
        Unsupported: there are doubtful nodes, and the two models were not compared.
    """
    if doubtful and result.error is None:
        raise Unsupported(
            f"opset {result.source} to {result.target}: whether these nodes keep their meaning could not be compared "
            f"({result.remark or 'verification is off'}): {'; '.join(doubtful)}"
        )


def _scope_of(model: ModelProto, opset: int, changed: list[str], doubtful: list[str]) -> _Scope:
    typed = model.graph
    with suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):  # else the declared types have to do
        typed = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value for value in (*typed.value_info, *typed.input, *typed.output)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    return _Scope(opset_of(model), opset, types, constants, changed, doubtful, names | types.keys() | constants.keys())


def _convert_graph(graph: GraphProto, scope: _Scope) -> None:
    """Convert the nodes of a graph in place."""
    inner = _Scope(
        scope.source,
        scope.target,
        {**scope.types, **{value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}},
        {**scope.constants, **{tensor.name: tensor for tensor in graph.initializer}},
        scope.changed,
        scope.doubtful,
        scope.names,
    )
    inner.names.update(name for node in graph.node for name in node.output)
    nodes = _convert_nodes(graph.node, inner)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(inner.initializers)


def _convert_nodes(nodes: Iterable[NodeProto], scope: _Scope) -> list[NodeProto]:
    result = []
    for node in nodes:
        for body in graphs_of(node):
            _convert_graph(body, scope)
        result.extend(_convert_node(node, scope))
    return result


def _convert_node(node: NodeProto, scope: _Scope) -> list[NodeProto]:
    """The node itself where its operator did not change, or what takes its place."""
    if node.domain not in ("", "ai.onnx"):
        return [node]
    before, after = (_schema(node.op_type, version) for version in (scope.source, scope.target))
    if before is None or after is None or before.since_version == after.since_version:
        return [node]
    if node.op_type == "GroupNormalization" and before.since_version < 21 <= scope.target:
        return _group_normalization(node, scope)
    label = node.name or node.output[0]
    if any(attribute.HasField("ref_attr_name") for attribute in node.attribute) or any(graphs_of(node)):
        return [_as_it_is(node, before, after, scope, "it refers to its function, or has a body")]
    try:
        made = onnx.version_converter.convert_version(_alone(node, scope), scope.target).graph
    except (RuntimeError, ValueError) as error:
        return [_as_it_is(node, before, after, scope, " ".join(str(error).split()))]
    if _same(made, node):
        return [node]
    scope.changed.append(
        f"{label}: {node.op_type}-{before.since_version} became {_names(made)} of opset {scope.target}"
    )
    return _spliced(made, node, scope)


def _group_normalization(node: NodeProto, scope: _Scope) -> list[NodeProto]:
    """GroupNormalization with a scale and bias per channel, as since 21, from those per group; ONNX's converter errs.

    Raises:
        Unsupported: the number of channels is not known.
    """
    label = node.name or node.output[0]
    shape = list(scope.types[node.input[0]].type.tensor_type.shape.dim) if node.input[0] in scope.types else []
    channels = shape[1].dim_value if len(shape) > 1 else 0
    groups = next(int(attribute.i) for attribute in node.attribute if attribute.name == "num_groups")
    if not channels:
        raise Unsupported(
            f"node {label!r}: GroupNormalization-18 has one scale per group, GroupNormalization-21 one per channel, "
            f"and the number of channels of {node.input[0]!r} is not known; export the model with its shapes"
        )
    made: list[NodeProto] = []

    def constant(values: list[int]) -> str:
        name = scope.fresh(f"{label}_sizes")
        scope.initializers.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def step(op_type: str, *inputs: str) -> str:
        name = scope.fresh(f"{label}_{op_type}")
        made.append(helper.make_node(op_type, inputs, [name], name))
        return name

    column, table, flat = constant([groups, 1]), constant([groups, channels // groups]), constant([channels])
    newer = NodeProto.FromString(node.SerializeToString())
    for index in (1, 2):
        newer.input[index] = step("Reshape", step("Expand", step("Reshape", node.input[index], column), table), flat)
    scope.changed.append(f"{label}: GroupNormalization-18 became one with a scale per channel")
    return [*made, newer]


def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """The schema in force; None where there is none, as for operators of early drafts."""
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _as_it_is(
    node: NodeProto, before: onnx.defs.OpSchema, after: onnx.defs.OpSchema, scope: _Scope, reason: str
) -> NodeProto:
    """The node unchanged where the newer operator takes it; verification says whether it means the same.

    Raises:
        Unsupported: the newer operator has no such attribute, or not so many inputs.
    """
    label, cause = node.name or node.output[0], f" ({reason})"
    old, new = (f"{node.op_type}-{schema.since_version}" for schema in (before, after))
    if after.deprecated:
        raise Unsupported(f"node {label!r}: {node.op_type} is not in opset {scope.target}{cause}")
    unknown = [item.name for item in node.attribute if item.name not in after.attributes]
    if unknown or not after.min_input <= len(node.input) <= after.max_input:
        what = f"attributes {unknown} are unknown to it" if unknown else f"it does not take {len(node.input)} inputs"
        what = f"{old} has no form as {new}: {what}"
        raise Unsupported(f"node {label!r}: {what}{cause}")
    if node.op_type not in _SAME_MEANING:
        scope.doubtful.append(f"{label} ({old} as {new}: {reason})")
    return node


def _alone(node: NodeProto, scope: _Scope) -> ModelProto:
    """The node as a model of its own."""
    small = [name for name in dict.fromkeys(node.input) if name in scope.constants and _is_small(scope.constants[name])]
    inputs = [name for name in dict.fromkeys(node.input) if name and name not in small]
    graph = helper.make_graph(
        [node],
        "one",
        [_typed(name, scope) for name in inputs],
        [_typed(name, scope) for name in node.output if name],
        [scope.constants[name] for name in small],
    )
    opset = helper.make_opsetid("", scope.source)
    model = helper.make_model(graph, opset_imports=[opset])
    model.ir_version = min(model.ir_version, max(4, helper.find_min_ir_version_for([opset])))
    return model


def _is_small(tensor: TensorProto) -> bool:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() > _SMALL:
        return False
    return tensor.data_type == TensorProto.STRING or byte_count(tensor) < _SMALL  # else the bytes may be elsewhere


def _typed(name: str, scope: _Scope) -> ValueInfoProto:
    if name in scope.types and scope.types[name].type.WhichOneof("value"):
        return scope.types[name]
    if name in scope.constants:
        tensor = scope.constants[name]
        return helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _same(made: GraphProto, node: NodeProto) -> bool:
    """True when the converter left the node as it was."""
    if len(made.node) != 1 or made.node[0].op_type != node.op_type:
        return False
    (other,) = made.node
    known, value_of = {attribute.name: attribute for attribute in node.attribute}, helper.get_attribute_value
    unchanged = len(other.attribute) == len(known) and all(
        attribute.name in known and value_of(attribute) == value_of(known[attribute.name])
        for attribute in other.attribute
        if attribute.type != AttributeProto.TENSOR
    )
    return unchanged and list(other.input) == list(node.input)


def _names(made: GraphProto) -> str:
    return " + ".join(node.op_type for node in made.node if node.op_type != "Constant") or "nothing"


def _spliced(made: GraphProto, node: NodeProto, scope: _Scope) -> list[NodeProto]:
    """The nodes that take the place of `node`, with values and constants under names of their own."""
    label = node.name or node.output[0]
    kept = {*node.input, *node.output}
    renamed: dict[str, str] = {}
    given = {value.name for value in made.input}
    for tensor in made.initializer:
        if tensor.name not in kept and tensor.name not in given:
            renamed[tensor.name] = scope.fresh(f"{label}_{tensor.name}")
            copy = TensorProto.FromString(tensor.SerializeToString())
            copy.name = renamed[tensor.name]
            scope.initializers.append(copy)
    for other in made.node:
        for name in other.output:
            if name and name not in kept:
                renamed[name] = scope.fresh(f"{label}_{name}")
    result = []
    for other in made.node:
        copy_ = NodeProto.FromString(other.SerializeToString())
        del copy_.input[:], copy_.output[:]
        copy_.input.extend(renamed.get(name, name) for name in other.input)
        copy_.output.extend(renamed.get(name, name) for name in other.output)
        last = any(name in node.output for name in copy_.output)
        copy_.name = node.name if last else f"{label}_{other.op_type}"
        if last:
            copy_.doc_string = node.doc_string
            copy_.metadata_props.extend(node.metadata_props)
        result.append(copy_)
    return result


def _constant_node(tensor: TensorProto) -> NodeProto:
    return helper.make_node("Constant", [], [tensor.name], value=tensor)


def verified(
    before: Graph, after: Graph, result: Conversion, inputs: Sequence[torch.Tensor] | None = None
) -> Conversion:
    """The conversion with the error that was measured, or the reason why none was.

    Raises:
        VerificationError: the graph at the newer opset computes something else, or does not run.
    """
    try:
        given = list(inputs) if inputs is not None else made_up(before)
        right = run(before, given)
    except Exception as error:
        return replace(result, error=None, remark=f"the model does not run on the inputs ({first_line(error)})")
    try:
        made = run(after, given)
    except Exception as error:
        raise VerificationError(
            f"the model at opset {result.target} does not run where that at opset {result.source} does: "
            f"{first_line(error)}"
        ) from error
    worst = 0.0
    for spec, expected, found in zip(before.outputs, right, made, strict=True):
        error_ = noise_to_signal(expected, found)
        if not error_ <= _TOLERANCE:
            raise VerificationError(
                f"the model at opset {result.target} computes another {spec.name!r} than at opset {result.source}: "
                f"noise to signal {error_:.1e}; rewritten were: {'; '.join(result.changed) or 'no nodes'}"
            )
        worst = max(worst, error_)
    return replace(result, error=worst, remark="")
