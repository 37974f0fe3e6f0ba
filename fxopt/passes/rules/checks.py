"""What several rules ask about types and shapes."""

from __future__ import annotations

import operator

from torch import fx

from fxopt.ir.graph import label
from fxopt.ir.pattern import Match, Mismatch, Refusal
from fxopt.ir.shapes import same_type
from fxopt.ir.views.common import is_onnx

_EXACT = (  # on shapes; no comparisons, whose answer under fake tensors is a guess about symbolic sizes
    "Add", "Cast", "Concat", "Div", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "ReduceProd",
    "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
_MOST_NODES = 256


def changed_type(match: Match, x: object) -> Refusal | None:
    """The refusal of a match whose root has another shape or element type than x, or an unknown one."""
    if not isinstance(x, fx.Node):
        return Mismatch("{} is a number", x)
    before, after = match.type(x), match.type(match.root)
    if before is None or after is None:
        return Refusal("the type of {} is unknown", label(x if before is None else match.root))
    if same_type(before, after):
        return None
    return Refusal("{} changes {} to {}", label(match.root), _shown(before[0]), _shown(after[0]))


def _shown(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None:
        return type(value).__name__
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def is_exact_shape(node: object) -> bool:
    """Whether an ONNX shape computed at run time is known for every size: no comparison of sizes is behind it."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen or current.op == "get_attr":
            continue
        seen.add(current)
        if is_onnx(current, "Shape", "Size"):
            continue
        if not is_exact_on_sizes(current) or len(seen) > _MOST_NODES:
            return False
        stack.extend(current.all_input_nodes)
    return True


def is_exact_on_sizes(node: fx.Node) -> bool:
    """Whether the operator computes with symbolic sizes without comparing them."""
    return node.target is operator.getitem or is_onnx(node, *_EXACT)
