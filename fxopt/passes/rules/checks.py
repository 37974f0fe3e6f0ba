"""What several rules ask about types and shapes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.fake_values import same_type
from fxopt.ir.graph import label, merged_shape
from fxopt.ir.pattern import Match, Mismatch, Refusal
from fxopt.ir.views.common import is_onnx

_EXACT = (  # polynomials and selections; comparisons, minima and quotients may agree at two sizes by chance
    "Add", "Cast", "Concat", "Expand", "Gather", "Identity", "Mul", "Neg", "ReduceProd", "ReduceSum", "Reshape",
    "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
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
    return Refusal("{} changes {} to {}", label(match.root), _Type(*before), _Type(*after))


@dataclass(frozen=True)
class _Type:
    """A type that is written only when somebody reads it."""

    value: Any
    probe: Any

    def __str__(self) -> str:
        shape = merged_shape(self.value, self.probe)
        if shape is None:
            return type(self.value).__name__
        return f"{str(self.value.dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def is_exact_shape(node: object) -> bool:
    """Whether an ONNX shape computed at run time is known for every size when it is known for two."""
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
    """Whether what the operator makes of sizes is known for every size when it is known for two."""
    return node.target is operator.getitem or is_onnx(node, *_EXACT)
