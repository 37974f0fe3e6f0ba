"""More pointwise operators: logarithms, waves, roundings, powers, division of integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.backends.tvm.kernels.pointwise import Tree
from fxopt.backends.tvm.lowering import Call, Lazy, Lowering, Rule
from fxopt.backends.tvm.rules.arrange import RULES as ARRANGE
from fxopt.backends.tvm.rules.normalise import RULES as NORMALISE
from fxopt.backends.tvm.rules.pointwise import RULES as POINTWISE
from fxopt.backends.tvm.rules.pointwise import expression
from fxopt.errors import Unsupported

_MOST_FACTORS = 16  # of a power that is multiplied out


def _floats(make: Any, result: torch.dtype | None = None) -> Rule:
    def rule(low: Lowering, call: Call) -> Lazy:
        source = call.get("self", call.get("input"))
        dtype = low.metas[source].dtype
        if dtype != torch.float32:
            raise Unsupported(f"takes float32 only, the operand is {dtype}")
        return expression(low, call.node, [source], make, dtype)

    return rule


def _rounding(name: str) -> Rule:
    """Integers stay as they are."""

    def rule(low: Lowering, call: Call) -> Any:
        if call.get("decimals"):
            raise Unsupported("rounds to decimals; expected to integers")
        if not low.metas[call["self"]].dtype.is_floating_point:
            return low.value(call["self"])
        return _floats(lambda a: (name, a))(low, call)

    return rule


def _test(value: float | None) -> Rule:
    """Whether elements are this value; None: whether they are NaN."""

    def make(a: Tree) -> Tree:
        return ("ne", a, a) if value is None else ("eq", a, ("constant", value, "float32"))

    return _floats(make)


def _is_infinite(a: Tree) -> Tree:
    return ("eq", ("abs", a), ("constant", math.inf, "float32"))


def _whole(low: Lowering, argument: Any) -> Any:
    """A number that is known, else the argument."""
    if not isinstance(argument, fx.Node):
        return argument
    known = low.constant(argument)
    if known is not None and known.numel() == 1:
        return known.item()
    found = low.metas[argument]
    return argument if isinstance(found, torch.Tensor) else found


def _pow(low: Lowering, call: Call) -> Any:
    """Small integers are multiplied out; else e**(y log x), which is NaN below zero as torch has it."""
    base, exponent = _whole(low, call["self"]), _whole(low, call["exponent"])
    inside = low.metas[call.node].dtype
    if inside != torch.float32:
        raise Unsupported(f"computes {inside}, expected float32")
    if isinstance(exponent, fx.Node):
        if isinstance(base, fx.Node):
            raise Unsupported("has neither a base nor an exponent that is one known number")
        if base <= 0:
            raise Unsupported(f"has the base {base}; expected one above zero")
        factor = ("constant", math.log(base), "float32")
        return expression(low, call.node, [exponent], lambda y: ("exp", ("mul", y, factor)), inside)
    return expression(low, call.node, [base], lambda x: _power(x, float(exponent)), inside)


def _power(x: Tree, exponent: float) -> Tree:
    size, one = abs(exponent), ("constant", 1.0, "float32")
    if size == 0.5:
        root = ("sqrt", x)
        return root if exponent > 0 else ("div", one, root)
    if not (size.is_integer() and size <= _MOST_FACTORS):
        return ("exp", ("mul", ("constant", exponent, "float32"), ("log", x)))
    found: Tree | None = None
    square = x
    count = int(size)
    while count:
        if count % 2:
            found = square if found is None else ("mul", found, square)
        square, count = ("mul", square, square), count // 2
    found = one if found is None else found
    return found if exponent >= 0 else ("div", one, found)


def _division(low: Lowering, call: Call) -> Lazy:
    """True, rounded down, or cut towards zero."""
    mode = call.get("rounding_mode")
    mode = "floor" if call.node.name.startswith("floor_divide") and mode is None else mode
    inside = low.metas[call.node].dtype
    if inside == torch.float32:
        rounded = {"floor": "floor", "trunc": "trunc"}.get(str(mode))

        def make(a: Tree, b: Tree) -> Tree:
            quotient: Tree = ("div", a, b)
            return quotient if rounded is None else (rounded, quotient)

        return expression(low, call.node, [call["self"], call["other"]], make, inside)
    if mode is None or inside not in (torch.int64, torch.int32):
        raise Unsupported(f"divides {inside}")
    name = "floordiv" if mode == "floor" else "truncdiv"
    return expression(low, call.node, [call["self"], call["other"]], lambda a, b: (name, a, b), inside)


def _floor_divide(low: Lowering, call: Call) -> Lazy:
    return _division(low, Call(call.node, {**call.arguments, "rounding_mode": "floor"}))


def _remainder(low: Lowering, call: Call) -> Lazy:
    """With the sign of the divisor."""
    inside = low.metas[call.node].dtype
    if inside in (torch.int64, torch.int32):
        return expression(low, call.node, [call["self"], call["other"]], lambda a, b: ("floormod", a, b), inside)
    if inside != torch.float32:
        raise Unsupported(f"divides {inside}")

    def make(a: Tree, b: Tree) -> Tree:
        return ("sub", a, ("mul", ("floor", ("div", a, b)), b))

    return expression(low, call.node, [call["self"], call["other"]], make, inside)


def _view(low: Lowering, call: Call) -> Any:
    """view(dtype) of the same type is the operand."""
    if call.node.target is not torch.ops.aten.view.dtype:
        return ARRANGE["view"](low, call)
    if low.metas[call["self"]].dtype != low.metas[call.node].dtype:
        raise Unsupported("takes bits for those of another type")
    return low.value(call["self"])


def _of_truth(name: str, operator: str) -> Rule:
    """Sums and products of truth values."""

    def rule(low: Lowering, call: Call) -> Any:
        if low.metas[call.node].dtype != torch.bool:
            return POINTWISE[name](low, call)
        arguments = [call["self"], call["other"]]
        return expression(low, call.node, arguments, lambda a, b: (operator, a, b), torch.bool)

    return rule


def _equal(operator: str, reverse: bool = False) -> Rule:
    """Comparison of truth values, as numbers."""

    def rule(low: Lowering, call: Call) -> Lazy:
        arguments = [call["self"], call["other"]]
        inside = torch.result_type(*(low.metas[item] if isinstance(item, fx.Node) else item for item in arguments))
        inside = torch.int32 if inside == torch.bool else inside
        return expression(low, call.node, arguments, lambda a, b: (operator, a, b), inside)

    return rule


def _layer_norm_of_three(low: Lowering, call: Call) -> list[Any]:
    """The result; mean and deviation are computed for nobody."""
    return [NORMALISE["layer_norm"](low, call), None, None]


RULES: dict[str, Rule] = {
    "native_layer_norm": _layer_norm_of_three,
    **{name: _floats(lambda a, name=name: (name, a)) for name in ("log", "log1p", "expm1", "sin", "cos", "sign")},
    **{name: _rounding(name) for name in ("floor", "ceil", "trunc", "round")},
    "log2": _floats(lambda a: ("mul", ("log", a), ("constant", 1 / math.log(2), "float32"))),
    "log10": _floats(lambda a: ("mul", ("log", a), ("constant", 1 / math.log(10), "float32"))),
    "exp2": _floats(lambda a: ("exp", ("mul", a, ("constant", math.log(2), "float32")))),
    "isnan": _test(None),
    "isinf": _floats(_is_infinite),
    "isposinf": _test(math.inf),
    "isneginf": _test(-math.inf),
    "pow": _pow,
    "div": _division,
    "true_divide": _division,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "view": _view,
    "mul": _of_truth("mul", "and"),
    "add": _of_truth("add", "or"),
    "maximum": _of_truth("maximum", "or"),
    "minimum": _of_truth("minimum", "and"),
    **{name: _equal(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}
