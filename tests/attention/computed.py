"""What a view of attention says, computed step by step in float64 from the values of its operands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import evaluate
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.views.attention import Attention, Operand, Term

Values = Mapping[fx.Node, Any]


def computed(graph: Graph, view: Attention, values: Values) -> torch.Tensor:
    """The result of a view, of the type of its node."""
    q, k, v = (operand(graph, part, values) for part in (view.q, view.k, view.v))
    if view.heads:
        counts = (view.heads[0], view.heads[1], view.heads[1])
        q, k, v = (x.unflatten(-1, (count, -1)).transpose(1, 2) for x, count in zip((q, k, v), counts, strict=True))
    k, v = (x.repeat_interleave(view.groups, -3) if view.groups > 1 else x for x in (k, v))
    factor = 1 / math.sqrt(q.shape[-1]) if view.scale is None else view.scale
    scores = q @ k.mT * factor
    if view.softcap:
        scores = view.softcap * torch.tanh(scores / view.softcap)
    shape = scores.shape
    for term in view.terms:
        scores = met(scores, term, values)
    scores = scores.reshape(shape)
    distance = torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2]).unsqueeze(1)
    if view.left is not None:
        scores = scores.masked_fill(distance < -view.left, -math.inf)
    if view.right is not None:
        scores = scores.masked_fill(distance > view.right, -math.inf)
    result = probabilities(view, scores, values) @ v
    if view.heads:
        result = result.transpose(1, 2).flatten(2)
    if view.result_perm is not None:
        result = result.permute(view.result_perm)
    made: torch.Tensor = values[view.node]
    return result.to(made.dtype)


def operand(graph: Graph, part: Operand, values: Values) -> torch.Tensor:
    """q, k or v as attention takes it."""
    x: Any = values[part.node]
    for node in part.replay:
        args, kwargs = (fx.map_arg(given, values.__getitem__) for given in (node.args[1:], node.kwargs))
        x = evaluate(graph, node, (x, *args), kwargs)
    found: torch.Tensor = x.double()
    return found if part.perm is None else found.permute(part.perm)


def met(scores: torch.Tensor, term: Term, values: Values) -> torch.Tensor:
    """The scores after a term, in its frame."""
    if term.frame is not None and len(term.frame) != scores.dim():
        lead = [size if isinstance(size, int) else -1 for size in term.frame[:-2]]
        scores = scores.reshape(*lead, *scores.shape[-2:])
    value: torch.Tensor = to_tensor(values[term.node])
    if term.form == "added" and value.dtype != torch.bool:
        return scores + value.double() * term.factor
    hides = ~value.bool() if term.form in ("keeps", "added") else value.bool()
    return scores.masked_fill(hides, term.hidden)


def probabilities(view: Attention, scores: torch.Tensor, values: Values) -> torch.Tensor:
    """The softmax, with a sink where there is one."""
    if view.sink is not None:
        sink = values[view.sink].double()
        sink = sink[0, :, 0, 0] if sink.dim() == 4 else sink
        column = sink[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    found = scores.softmax(-1)
    return found.nan_to_num() if view.empty_rows_are_zero else found
