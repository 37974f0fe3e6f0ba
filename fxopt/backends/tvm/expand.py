"""Operators without a kernel, written in those that have one: torch's own decompositions, at fixed sizes.

`group_norm`, `softplus`, `upsample_bilinear2d`, `lstm` and many more are compositions of a few operators. Each node
that is refused is traced alone, with fake tensors of its operands' types, and what comes out takes its place and its
name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.source import Source
from fxopt.backends.tvm.trial import refusals
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, provenance
from fxopt.ir.lower.quiet import quiet

_ROUNDS = 4  # decompositions may give operators that have one


def settled(source: Source, machine: Machine) -> tuple[Source, dict[fx.Node, str]]:
    """The source with decomposed operators, and why those that are left have no kernel.

    Raises:
        Unsupported: an input has a type that no kernel takes.
    """
    for _ in range(_ROUNDS):
        reasons, metas = refusals(source, machine)
        if not reasons:
            return source, {}
        graph, failures = _decomposed(source.graph, reasons, metas)
        if graph is None:
            return source, {node: f"{reason}{failures.get(node, '')}" for node, reason in reasons.items()}
        source = replace(source, graph=graph)
    return source, refusals(source, machine)[0]


def _decomposed(
    graph: Graph, nodes: Iterable[fx.Node], metas: Mapping[fx.Node, Any]
) -> tuple[Graph | None, dict[fx.Node, str]]:
    """The graph with some nodes decomposed, None when torch can decompose none of them; and where torch failed."""
    found = graph.copy()
    copies = dict(zip(graph.nodes, found.nodes, strict=True))
    values = {copy: metas.get(node) for node, copy in copies.items()}
    changed, failures = False, {}
    for node in nodes:
        try:
            changed |= _replaced(found, copies[node], values)
        except Unsupported as error:
            failures[node] = f"; {error}"
    if not changed:
        return None, failures
    found.prune()
    return found, failures


# What torch counts as core, and has a decomposition for all the same.
_MORE = (
    *(
        "_log_softmax",
        "_softmax",
        "adaptive_max_pool2d",
        "avg_pool1d",
        "celu",
        "elu",
        "glu",
        "hardshrink",
        "leaky_relu",
    ),
    *("linalg_vector_norm", "log_sigmoid_forward", "logit", "mish", "native_batch_norm", "rrelu"),
    *("softshrink", "threshold", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d"),
)

_NOT = ("adaptive_max_pool2d",)  # what comes out has no kernels either


@cache
def _table() -> Any:
    from torch._decomp import core_aten_decompositions, get_decompositions

    packets = [getattr(torch.ops.aten, name) for name in _MORE]
    own = {
        torch.ops.aten.var.correction: _variance,
        torch.ops.aten.var_mean.correction: _variance_and_mean,
        torch.ops.aten.group_norm.default: _group_norm,
        torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_average,
    }
    table = {**core_aten_decompositions(), **get_decompositions(packets), **own}
    for name in _NOT:
        table.pop(getattr(torch.ops.aten, name).default, None)
    return table


def _variance(x: Tensor, dim: list[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance_and_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _variance_and_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Torch's own decomposition leads to its `prims`, for which there are no rules."""
    axes = list(range(x.dim())) if not dim else [axis % x.dim() for axis in dim]
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True)
    square = (x - mean).square().sum(axes, keepdim=keepdim)
    divisor = count - (1 if correction is None else correction)
    return square * (1 / divisor if divisor > 0 else math.inf), mean if keepdim else x.mean(axes)


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    y = torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=eps).reshape(x.shape)
    channels = (1, -1, *(1 for _ in x.shape[2:]))
    y = y if weight is None else y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def _adaptive_average(x: Tensor, size: list[int]) -> Tensor:
    """Windows of different sizes, as products with matrices of shares along both axes."""
    rows, columns = (_shares(x.shape[axis], int(size[axis + 2])) for axis in (-2, -1))
    return rows @ (x @ columns.t())


def _shares(length: int, out: int) -> Tensor:
    """[out, length]: how much each element adds to the mean of each window."""
    begins = [index * length // out for index in range(out)]
    ends = [-(-(index + 1) * length // out) for index in range(out)]
    return torch.tensor(
        [[1 / (end - begin) if begin <= at < end else 0.0 for at in range(length)] for begin, end in zip(begins, ends)]
    )


def _replaced(graph: Graph, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether the node was decomposed; its users then take the results of what replaces it.

    Raises:
        Unsupported: torch fails in its own decomposition.
    """
    flat, structure = pytree.tree_flatten((node.args, node.kwargs))
    operands = [item for item in flat if isinstance(item, fx.Node)]
    tensors = list(dict.fromkeys(item for item in operands if isinstance(values.get(item), torch.Tensor)))
    if any(values.get(item) is None for item in operands):
        return False

    target: Any = _table().get(node.target, node.target)

    def call(*given: torch.Tensor) -> Any:
        known = {**values, **dict(zip(tensors, given, strict=True))}
        whole = [known[item] if isinstance(item, fx.Node) else item for item in flat]
        args, kwargs = _mutable(pytree.tree_unflatten(whole, structure))
        return target(*args, **kwargs)

    examples = [torch.empty_like(values[item], device="cpu") for item in tensors]
    try:
        # oneDNN's operators for recurrent layers have no decompositions
        with torch.no_grad(), quiet(), torch.backends.mkldnn.flags(enabled=False):
            pure = torch.func.functionalize(call)
            traced = make_fx(pure, decomposition_table=_table(), tracing_mode="fake")(*examples)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unsupported(f"torch cannot decompose it: {why}") from error
    if any(item.target is node.target for item in traced.graph.nodes):
        return False
    _inline(graph, node, traced, tensors)
    return True


def _mutable(item: Any) -> Any:
    """fx keeps arguments in lists that some decompositions cannot change."""
    if isinstance(item, (list, tuple)):
        return (list if isinstance(item, list) else tuple)(map(_mutable, item))
    return {key: _mutable(value) for key, value in item.items()} if isinstance(item, dict) else item


def _inline(graph: Graph, node: fx.Node, traced: fx.GraphModule, operands: list[fx.Node]) -> None:
    made: dict[fx.Node, Any] = {}
    given = iter(operands)
    for item in traced.graph.nodes:
        if item.op == "placeholder":
            made[item] = next(given)
        elif item.op == "get_attr":
            made[item] = graph.add_constant(getattr(traced, str(item.target)).detach(), item.name)
        elif item.op == "call_function":
            with graph.fx.inserting_before(node):
                made[item] = graph.fx.node_copy(item, made.__getitem__)
            made[item].meta = {"val": item.meta.get("val"), "provenance": provenance(node)}
    (result,) = traced.graph.output_node().args
    found: Any = fx.map_arg(result, made.__getitem__)
    if isinstance(found, fx.Node):
        node.replace_all_uses_with(found)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])
            graph.fx.erase_node(user)
    graph.fx.erase_node(node)
