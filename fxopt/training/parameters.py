"""Which constants of a graph are trained: weights, biases, factors of norms and tables of embeddings, by their role."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.errors import InvalidOption, Unsupported, unknown
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.views.quantized import quantized_operators

WEIGHT, VECTOR, TABLE = "weight", "vector", "table"

# Operands that are parameters, by operator: (position, role).
_W, _WB, _VV = ((1, WEIGHT),), ((1, WEIGHT), (2, VECTOR)), ((1, VECTOR), (2, VECTOR))
_RECURRENT = ((1, WEIGHT), (2, WEIGHT), (3, VECTOR))
_ROLES: dict[str, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "matmul", "mm", "bmm"), _W),
    **dict.fromkeys(("Gemm", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "Attention", "linear"), _WB),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _WB),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _WB),
    "addmm": ((0, VECTOR), (2, WEIGHT)),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"), _VV),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization", "PRelu", "prelu"), ((1, VECTOR),)),
    **dict.fromkeys(("BiasGelu", "FastGelu"), ((1, VECTOR),)),
    "SkipLayerNormalization": ((2, VECTOR), (3, VECTOR), (4, VECTOR)),
    "SkipSimplifiedLayerNormalization": ((2, VECTOR), (3, VECTOR)),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _VV),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "group_norm"), ((2, VECTOR), (3, VECTOR))),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), ((2, VECTOR),)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
    "Gather": ((0, TABLE),),
    "embedding": ((0, TABLE),),
}
_PER_FEATURE = ("Add", "Mul", "Sum", "add", "mul")  # biases, factors of norms that are spelled out, layer scales
_MOVING = frozenset({
    "Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast",
    "t", "permute", "transpose", "view", "reshape", "squeeze", "unsqueeze", "expand", "_to_copy",
})  # fmt: skip
_DOMAINS = ("", "com.microsoft")
_ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear")


def parameters(graph: Graph, train: str | None = None) -> dict[str, str]:
    """The trainable constants as {target: role}, in the order of the graph.

    Args:
        train: a regular expression over the names of constants and of the operators that use them: these floating-point
            constants are trained, whatever their role; None: all that have a role.

    Raises:
        Unsupported: nothing can be trained.
        UnknownName, InvalidOption: the expression matches nothing, or is none.
    """
    _refuse_quantized(graph)
    roles = dict(_with_roles(graph))
    if train is None:
        chosen = roles
    else:
        try:
            pattern = re.compile(train)
        except re.error as error:
            raise InvalidOption(f"train={train!r} is not a regular expression: {error}") from error
        names = _names(graph)
        chosen = {
            target: roles.get(target, WEIGHT)
            for target, known in names.items()
            if any(pattern.search(name) for name in known)
        }
        if not chosen:
            known = {next(iter(names[target])) for target in roles}
            raise unknown("constant (none matches train=)", train, known)
    found = {target: chosen[target] for target in _floating(graph) if target in chosen}
    if not found:
        raise Unsupported(
            f"{graph.name} has no trainable parameters: no floating-point weights, biases or norms "
            f"{'of operators that are known here; name constants with train=' if train is None else f'match {train!r}'}"
        )
    return found


def _refuse_quantized(graph: Graph) -> None:
    """Rounding has no gradient."""
    found = next((str(view.node.target) for view in quantized_operators(graph)), "")
    for node in graph.calls():
        if getattr(node.target, "namespace", "") == "fxopt" or _name(node) in _ROUNDING:
            found = found or f"{node.target}"
        if found:
            raise Unsupported(
                f"node {label(node)!r}: the model holds {found}, and rounding has no gradient; fine-tune the float "
                "model, then quantise the result"
            )


def _with_roles(graph: Graph) -> Iterator[tuple[str, str]]:
    """Constants with their roles; a vector that is added or multiplied counts behind a weight only."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = _name(node)
        places = _ROLES.get(name, ())
        found = [each for place, role in places for each in _constant(graph, _argument(node, place), role)]
        yield from found
        if found or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        if name in _PER_FEATURE and len(node.args) == 2:
            for value, other in (node.args, node.args[::-1]):
                if other in behind and _is_per_feature(graph, value):
                    yield from _constant(graph, value, VECTOR)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OnnxOp):
        return target.op_type if target.domain in _DOMAINS else ""
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet, "__name__", "")) if getattr(target, "namespace", "") == "aten" else ""


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if position < len(node.args) else None


def _constant(graph: Graph, value: Any, role: str) -> Iterator[tuple[str, str]]:
    """The constant behind operators that only move or cast."""
    while isinstance(value, fx.Node) and _name(value) in _MOVING:
        value = value.args[0]
    constant = graph.constant(value)
    if constant is None or (role in (WEIGHT, TABLE) and constant.dim() < 2):
        return  # a matrix times a vector of frequencies or the like
    yield str(value.target), role


def _is_per_feature(graph: Graph, value: Any) -> bool:
    """A constant with one axis of more than one element: no mask, no table of positions, no number."""
    while isinstance(value, fx.Node) and _name(value) in _MOVING:
        value = value.args[0]
    constant = graph.constant(value)
    return constant is not None and 1 < constant.numel() == max(constant.shape)


def _floating(graph: Graph) -> Iterator[str]:
    """Constants that can have a gradient: finite floats."""
    for node in graph.fx.find_nodes(op="get_attr"):
        value = graph.constant(node)
        if value is not None and value.dtype in _FLOATS and value.numel() and bool(torch.isfinite(value).all()):
            yield str(node.target)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _names(graph: Graph) -> dict[str, dict[str, None]]:
    """What the user may call each floating-point constant: its own names, and those of the operators that use it."""
    names: dict[str, dict[str, None]] = {}
    for node in graph.fx.find_nodes(op="get_attr"):
        value = graph.constant(node)
        if value is None or value.dtype not in _FLOATS:
            continue
        known = names.setdefault(str(node.target), {})
        known.update(dict.fromkeys((label(node), str(node.target), *map(label, node.users))))
    return names
