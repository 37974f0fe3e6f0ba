"""What is done to every graph that `torch.export` gives."""

from __future__ import annotations

import torch
from torch import fx

_CHECKS = (  # have no value; the shapes that they check were checked by the capture
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_functional_assert_async",
    "_functional_sym_constrain_range",
)


def drop_checks(graph: fx.Graph) -> None:
    """Remove assertions, and the symbolic comparisons that only they use."""
    for node in reversed(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if node.op == "call_function" and not node.users and getattr(packet, "__name__", "") in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def is_same_value(node: fx.Node) -> bool:
    """True for a copy (dropout in evaluation mode, detach) of an inner value with the same strides."""
    aten = torch.ops.aten
    copies = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
    if node.target not in copies or node.kwargs:
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    if source.op != "call_function" and any(user.op == "output" for user in node.users):
        return False  # a result must not share its memory with an input or a weight
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return str(before.stride()) == str(after.stride())
