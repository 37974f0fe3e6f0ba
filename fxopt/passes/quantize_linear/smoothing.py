"""Smoothing: move outliers of activations into the weights, x W' = (x / s) (W s)', with s per input.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2023),
equation 4; the strength is chosen per value on calibration rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.neutral import read
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.stats import Stats, ValueStats

STRENGTHS = (0.5, 0.65, 0.8, 0.9)
_LIMITS = (0.05, 20.0)


def factors(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """s [in] = max|x| ** strength / max|w| ** (1 - strength), geometric mean 1.

    Args:
        largest: max|x| of each input, [in].
        weights: of all linears that take the value, each [out, in].
    """
    heaviest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    tiny = 1e-5
    s = largest.clamp(min=tiny) ** strength / heaviest.clamp(min=tiny) ** (1 - strength)
    return (s / s.log().mean().exp()).clamp(*_LIMITS)


def siblings(graph: Graph, x: fx.Node) -> list[Linear]:
    """Every linear that takes the value `x`."""
    found: dict[fx.Node, Linear] = {}
    for user in x.users:
        for node in (*user.users, user):
            view = linear(graph, node)
            if isinstance(view, Linear) and view.x is x:
                found.setdefault(user, view)
    return list(found.values())


@dataclass(frozen=True)
class Smoothing:
    """How one value is smoothed: s [in], and s from either half of the calls alone, to judge it on the other one."""

    strength: float
    s: Tensor
    halves: tuple[Tensor, Tensor] | None


def chosen(graph: Graph, view: Linear, stats: Stats, error: Callable[[Linear, Smoothing], float]) -> Smoothing:
    """The smoothing of the value that the linear takes: the strength with the smallest summed error of its takers."""
    key = ("smoothing", stats.key(view.x))
    if key not in stats.cache:
        views = siblings(graph, view.x)
        weights = [found.weight(graph) for found in views]
        tried = [_smoothing(stats[view.x], weights, strength) for strength in STRENGTHS]
        stats.cache[key] = min(tried, key=lambda smoothing: sum(error(found, smoothing) for found in views))
    found: Smoothing = stats.cache[key]
    return found


def _smoothing(seen: ValueStats, weights: Sequence[Tensor], strength: float) -> Smoothing:
    halves = None
    if seen.calls > 1:
        first, second = (factors(half.largest(), weights, strength) for half in seen.halves)
        halves = (first, second)
    return Smoothing(strength, factors(seen.largest(), weights, strength), halves)


def smoothed(graph: Graph, x: fx.Node, s: Tensor, made_by: str) -> fx.Node:
    """The node x / s; made once per value."""
    for user in x.users:
        if provenance(user)[-1] == made_by and _is_product(graph, user, x, s):
            return user
    first = next(node for node in _after(x) if node.op not in ("placeholder", "get_attr"))
    builder = Builder(graph, first, made_by, like=first if x.op == "placeholder" else x)
    return builder.mul(x, builder.const(1 / s, f"{label(x)}_smoothing"))


def _is_product(graph: Graph, node: fx.Node, x: fx.Node, s: Tensor) -> bool:
    product = read(graph, node, "mul")
    if product is None or product[0] is not x:
        return False
    constant = graph.constant(product[1])
    return constant is not None and constant.shape == s.shape and bool(torch.equal(constant, 1 / s))


def _after(node: fx.Node) -> list[fx.Node]:
    found = []
    current = node.next
    while current.op != "root":
        found.append(current)
        if current.op not in ("placeholder", "get_attr"):
            break
        current = current.next
    return found
