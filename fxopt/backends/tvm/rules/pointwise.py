"""Pointwise operators: each gives an expression, which its one user may take over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backends.tvm.kernels.pointwise import Tree
from fxopt.backends.tvm.lowering import Call, Lazy, Lowering, Rule, dtype_of
from fxopt.backends.tvm.values import DTYPES, TYPES, Value
from fxopt.errors import Unsupported

Make = Callable[..., Tree]
_MOST_NODES = 40  # of a fused expression


def expression(low: Lowering, node: fx.Node, arguments: Sequence[Any], make: Make, inside: torch.dtype) -> Lazy:
    """make(tree, ...) over operands cast to the type `inside`; the result has the node's own type."""
    meta: torch.Tensor = low.metas[node]
    shape = tuple(meta.shape)
    result = dtype_of(meta, node)
    wanted = dtype_of(torch.empty(0, dtype=inside, device="meta"), node)
    operands: list[Value] = []
    trees: list[Tree] = []
    for argument in arguments:
        argument = low.number(argument) if _is_number(low, argument) else argument
        if not isinstance(argument, fx.Node):
            trees.append(("constant", float(argument) if wanted == "float32" else int(argument), wanted))
            continue
        known = low.constant(argument)
        if known is not None and known.numel() == 1 and known.dtype in DTYPES:
            trees.append(("constant", known.to(inside).item(), wanted))
            continue
        tree, reads, dtype = low.parts(argument, shape)
        if _size(tree) > _MOST_NODES or len(operands) + len(reads) > 8:
            value = low.value(argument)
            tree, reads = ("load", 0), (value,)
        tree = _renumbered(tree, [_place(operands, value) for value in reads])
        trees.append(tree if dtype == wanted else ("cast", tree, dtype, wanted))
    made = make(*trees)
    return Lazy(made, tuple(operands), shape, result)


def _is_number(low: Lowering, argument: Any) -> bool:
    return isinstance(argument, fx.Node) and not isinstance(low.metas[argument], torch.Tensor)


def _place(operands: list[Value], value: Value) -> int:
    for index, known in enumerate(operands):
        if known is value:
            return index
    operands.append(value)
    return len(operands) - 1


def _renumbered(tree: Tree, places: list[int]) -> Tree:
    if tree[0] == "load":
        return ("load", places[tree[1]])
    return tuple(_renumbered(part, places) if isinstance(part, tuple) else part for part in tree)


def _size(tree: Tree) -> int:
    return 1 + sum(_size(part) for part in tree if isinstance(part, tuple))


def _unary(make: Make, *, floats: bool = True) -> Rule:
    def rule(low: Lowering, call: Call) -> Lazy:
        source = call.get("self", call.get("input"))
        dtype = low.metas[source].dtype
        if floats and dtype != torch.float32:
            raise Unsupported(f"takes float32 only, the operand is {dtype}")
        return expression(low, call.node, [source], make, dtype)

    return rule


def _binary(operator: str, *, compares: bool = False, reverse: bool = False) -> Rule:
    def rule(low: Lowering, call: Call) -> Lazy:
        arguments = [call["self"], call["other"]]
        alpha = call.get("alpha", 1)
        inside = torch.result_type(*(_meta(low, item) for item in arguments))
        if not compares:
            inside = low.metas[call.node].dtype
        if operator == "div" and (call.get("rounding_mode") is not None or inside != torch.float32):
            raise Unsupported("divides float32 without rounding only")
        if inside == torch.bool:
            raise Unsupported("has no kernel for truth values")

        def make(a: Tree, b: Tree) -> Tree:
            if alpha not in (1, None):
                b = ("mul", b, ("constant", alpha, DTYPES[inside]))
            return (operator, b, a) if reverse else (operator, a, b)

        return expression(low, call.node, arguments, make, inside)

    return rule


def _meta(low: Lowering, argument: Any) -> Any:
    return low.metas[argument] if isinstance(argument, fx.Node) else argument


def _pow(low: Lowering, call: Call) -> Any:
    exponent = low.number(call["exponent"])
    known = low.constant(call["exponent"])
    exponent = known.item() if known is not None and known.numel() == 1 else exponent
    makes: dict[Any, Make] = {
        2: lambda a: ("mul", a, a),
        3: lambda a: ("mul", ("mul", a, a), a),
        0.5: lambda a: ("sqrt", a),
        -0.5: lambda a: ("rsqrt", a),
        -1: lambda a: ("div", ("constant", 1.0, "float32"), a),
    }
    if isinstance(exponent, torch.Tensor) or exponent not in makes:
        raise Unsupported(f"has kernels for the exponents {sorted(makes)}, not {exponent}")
    return _unary(makes[exponent])(low, call)


def _clamp(low: Lowering, call: Call) -> Lazy:
    low_end, high_end = call.get("min", call.get("min_val")), call.get("max", call.get("max_val"))
    dtype = low.metas[call["self"]].dtype

    def make(a: Tree) -> Tree:
        if low_end is not None:
            a = ("maximum", a, ("constant", low_end, DTYPES[dtype]))
        return a if high_end is None else ("minimum", a, ("constant", high_end, DTYPES[dtype]))

    if any(isinstance(end, fx.Node) for end in (low_end, high_end)):
        raise Unsupported("clamps to numbers only")
    if dtype not in DTYPES or dtype == torch.bool:
        raise Unsupported(f"takes numbers, not {dtype}")
    return expression(low, call.node, [call["self"]], make, dtype)


def _where(low: Lowering, call: Call) -> Lazy:
    return _select(low, call.node, call["condition"], call["self"], call["other"])


def _masked_fill(low: Lowering, call: Call) -> Lazy:
    return _select(low, call.node, call["mask"], call["value"], call["self"])


def _select(low: Lowering, node: fx.Node, condition: Any, a: Any, b: Any) -> Lazy:
    inside = low.metas[node].dtype
    if low.metas[condition].dtype != torch.bool:
        raise Unsupported(f"its condition is {low.metas[condition].dtype}, expected bool")
    chosen = expression(low, node, [condition], lambda c: c, torch.bool)
    rest = expression(low, node, [a, b], lambda x, y: ("pair", x, y), inside)
    operands = list(chosen.operands)
    places = [_place(operands, value) for value in rest.operands]
    _, x, y = _renumbered(rest.tree, places)
    return Lazy(("where", chosen.tree, x, y), tuple(operands), rest.shape, rest.dtype)


def _cast(low: Lowering, call: Call) -> Lazy:
    source = call["self"]
    target = DTYPES.get(low.metas[call.node].dtype)
    given = low.metas[source].dtype
    if target is None or given not in DTYPES:
        raise Unsupported(f"converts {given} to {low.metas[call.node].dtype}; the kernels have {TYPES}")
    if given == low.metas[call.node].dtype:
        return expression(low, call.node, [source], lambda a: a, given)
    return expression(low, call.node, [source], lambda a: ("cast", a, DTYPES[given], target), given)


def _gelu(low: Lowering, call: Call) -> Any:
    name = "gelu_tanh" if call["approximate"] == "tanh" else "gelu"
    return _unary(lambda a: (name, a))(low, call)


def _logical(operator: str) -> Rule:
    def rule(low: Lowering, call: Call) -> Lazy:
        arguments = [call["self"], call["other"]] if "other" in call.arguments else [call["self"]]
        if any(low.metas[item].dtype != torch.bool for item in arguments if isinstance(item, fx.Node)):
            raise Unsupported("takes truth values only")
        return expression(low, call.node, arguments, lambda *parts: (operator, *parts), torch.bool)

    return rule


def _named(name: str) -> Rule:
    return _unary(lambda a: (name, a))


_SAME = ("relu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "relu6", "exp", "erf", "sqrt", "rsqrt", "abs",
         "floor")  # fmt: skip

RULES: dict[str, Rule] = {
    **{name: _named(name) for name in _SAME},
    **{name: _binary(name) for name in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{name: _binary(name, compares=True) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "true_divide": _binary("div"),
    "rsub": _binary("sub", reverse=True),
    "neg": _unary(lambda a: ("sub", ("constant", 0.0, "float32"), a)),
    "reciprocal": _unary(lambda a: ("div", ("constant", 1.0, "float32"), a)),
    "square": _unary(lambda a: ("mul", a, a)),
    "gelu": _gelu,
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardtanh": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_not": _logical("not"),
    "bitwise_and": _logical("and"),
    "bitwise_or": _logical("or"),
    "bitwise_not": _logical("not"),
    "__and__": _logical("and"),
    "__or__": _logical("or"),
    "to": _cast,
    "_to_copy": _cast,
}
