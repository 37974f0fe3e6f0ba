"""A graph for GPUs: fxopt operators become kernels with packed weights, or what comes next, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.backends.triton.chips import chip_of
from fxopt.backends.triton.lower import attentions, linears, qkv
from fxopt.backends.triton.lower.job import Job, Kernels
from fxopt.ir.graph import Graph
from fxopt.ir.target import Target

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)
RULES: dict[Any, Callable[[Job, fx.Node], None]] = {**linears.RULES, **attentions.RULES}


def lowered(graph: Graph, target: Target) -> Job:
    """A copy of a graph of aten operators with kernels in it, the verdicts, and the compiled kernels."""
    job = Job(graph.copy(), target, Kernels(chip_of(target)))
    qkv.fuse(job)
    job.graph.prune()
    for node in list(job.graph.calls()):
        rule = RULES.get(node.target)
        if rule is not None and not node._erased:
            rule(job, node)
    for node in job.graph.calls():
        if node.target in _VIEWS:  # kernels may give other strides than what they replace
            node.target = _ATEN.reshape.default
    job.graph.prune()
    return job


__all__ = ["lowered"]
