"""What may not be merged, moved or passed through: random and effectful operators, shared memory, changed strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.graph import Graph, has_effect, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.onnx.op import OnnxOp

_ONNX_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_UNINITIALISED = ("aten::empty", "aten::new_empty", "aten::resize")
_KNOWN_DOMAINS = ("", "ai.onnx.ml")


def is_pure(node: fx.Node) -> bool:
    """True when the node's value depends on its arguments alone, and nothing else happens."""
    if node.op != "call_function" or effectful(node):
        return False
    if isinstance(node.target, OnnxOp) and node.target.op_type == "Dropout":
        return len(node.args) < 3 or node.args[2] is None
    return _is_deterministic(node.target)


@cache
def _is_deterministic(target: Any) -> bool:
    if isinstance(target, OnnxOp):
        known = target.domain in _KNOWN_DOMAINS or target.has_reference
        return known and target.op_type not in _ONNX_RANDOM
    if isinstance(target, OpOverload):
        seeded = torch.Tag.nondeterministic_seeded in target.tags
        return not seeded and not target._schema.name.startswith(_UNINITIALISED)
    return not isinstance(target, torch._ops.HigherOrderOperator)


_EFFECTS: dict[Any, bool] = {}


def effectful(node: fx.Node) -> bool:
    """`has_effect`, asked once per operator."""
    if node.op != "call_function":
        return False
    found = _EFFECTS.get(node.target)
    if found is None:
        found = _EFFECTS[node.target] = has_effect(node)
    return found


def is_view(node: fx.Node) -> bool:
    """True for a torch operator whose value may share memory with its first argument."""
    return isinstance(node.target, OpOverload) and _shows_argument(node.target)


@cache
def _shows_argument(target: OpOverload[..., Any]) -> bool:
    arguments = target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None


def base(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_returned(node: fx.Node) -> bool:
    """Whether the value, or a view of it, is a result of the graph."""
    seen = {node}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and (is_view(user) or not isinstance(user.target, OpOverload)):
                seen.add(user)
                stack.append(user)
    return False


def returned(graph: Graph) -> set[fx.Node]:
    """All nodes for which `is_returned` holds, in one walk."""
    found: set[fx.Node] = set()
    for node in reversed(graph.fx.nodes):
        for user in node.users:
            passes = is_view(user) or not isinstance(user.target, OpOverload)
            if user.op == "output" or (user in found and passes):
                found.add(node)
                break
    return found


def pass_through(graph: Graph, old: fx.Node, kept: fx.Node, value: Callable[[object], Any]) -> Refusal | None:
    """Why the users of `old` may not get the existing value `kept` instead; `value` gives fake tensors.

    In torch graphs a result must not share memory with an input, a constant or another result when it did not before,
    and operators that follow may need the strides. In ONNX graphs an Identity stays where it gives an input, a constant
    or another result the name of a result: the file would need another one in its place.
    """
    if graph.origin == "onnx":
        return _needs_a_name(old, kept)
    before, after = value(old), value(kept)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return Refusal("the strides of {} are unknown", label(kept))
    if _strides(before) != _strides(after):
        return Refusal(
            "it changes the strides from {} to {}, which a view after it may need", after.stride(), before.stride()
        )
    if is_view(old) or not is_returned(old):
        return None
    source = base(kept)
    if source.op in ("placeholder", "get_attr"):
        return Refusal("the result would share the memory of {}", label(source))
    if is_returned(source):
        return Refusal("two results would share the memory of {}", label(source))
    return None


def _needs_a_name(old: fx.Node, kept: fx.Node) -> Refusal | None:
    is_identity = isinstance(old.target, OnnxOp) and old.target.op_type == "Identity"
    if not is_identity or any(user.op != "output" for user in old.users):
        return None
    if kept.op in ("placeholder", "get_attr"):
        return Refusal("a result that is {} needs an operator that gives it its name", label(kept))
    if any(user.op == "output" for user in kept.users):
        return Refusal("{} is a result already, and each has a name of its own", label(kept))
    return None


def _strides(tensor: torch.Tensor) -> list[Any]:
    """The strides that matter; symbolic ones as text, since comparing them would guard."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    shown = ((size, stride if type(stride) is int else str(stride)) for size, stride in pairs)
    return [stride for size, stride in shown if type(size) is not int or size != 1]
