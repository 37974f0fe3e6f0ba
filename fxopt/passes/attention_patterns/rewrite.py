"""Write attention with patterns; heads with one pattern lie together, and skipped ones leave the linears around."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label
from fxopt.ir.ops.attention_pattern import BLOCK, attention_pattern
from fxopt.passes.attention_patterns.modes import FULL, SKIP, Mode
from fxopt.passes.attention_patterns.site import Rows, Site, join, operand_nodes, split


@dataclass(frozen=True)
class Arrangement:
    """The heads in their new order: `heads` are their old numbers."""

    heads: tuple[int, ...]
    modes: tuple[Mode, ...]

    @property
    def numbers(self) -> list[int]:
        """The patterns of all, as the operator takes them."""
        return [number for mode in self.modes for number in mode.pattern]

    def blocks(self, length: int) -> Tensor | None:
        """Bool [heads, n, n], where some head has a list of blocks."""
        if all(mode.blocks is None for mode in self.modes):
            return None
        count = -(-length // BLOCK)
        every = torch.ones(count, count, dtype=torch.bool)
        return torch.stack([every if mode.blocks is None else mode.blocks for mode in self.modes])

    def columns(self, width: int) -> Tensor:
        """The channels of these heads, in this order."""
        return torch.cat([torch.arange(head * width, (head + 1) * width) for head in self.heads])


def arranged(modes: list[Mode], folds: bool) -> Arrangement:
    """Heads of one mode together and without the skipped ones where the linears around can be changed."""
    if not folds:
        return Arrangement(tuple(range(len(modes))), tuple(modes))
    first = {mode.key: index for index, mode in reversed(list(enumerate(modes)))}
    kept = [head for head, mode in enumerate(modes) if mode.key != SKIP.key]
    kept = kept or [0]  # an attention without heads is nothing that runs
    order = sorted(kept, key=lambda head: (modes[head].key != FULL.key, modes[head].name, first[modes[head].key], head))
    return Arrangement(tuple(order), tuple(modes[head] for head in order))


def rewrite(graph: Graph, site: Site, modes: list[Mode], name: str) -> None:
    """One operator for all heads in the place of the attention."""
    plan = arranged(modes, site.folds)
    b = Builder(graph, site.view.node, name)
    if site.folds:
        taken = [split(b, site, _rows(graph, each, plan, site, name), len(plan.heads)) for each in site.inputs or ()]
    else:
        taken = operand_nodes(b, site)
    listed = plan.blocks(site.length)
    blocks = () if listed is None else (b.const(listed, f"{label(site.view.node)}_blocks"),)
    scale = float(site.view.factor or 0.0)
    result = b.call(attention_pattern.target, *taken, plan.numbers, scale, *blocks)
    if site.folds:
        _fold_output(graph, site, plan, result, name)
    elif site.joined is not None:  # torch's own attention gives what can be viewed so, this is reshaped
        graph.replace(site.joined, join(Builder(graph, site.joined, name), site, result, site.heads))
    else:
        turned = result if site.view.result_perm is None else b.transpose(result, site.view.result_perm)
        graph.replace(site.view.node, turned)
    graph.prune()
    if not site.view.node.users and site.view.node in graph.fx.nodes:  # it counts as random, as dropout is
        graph.erase(site.view.node)
        graph.prune()


def _rows(graph: Graph, rows: Rows, plan: Arrangement, site: Site, name: str) -> torch.fx.Node:
    """The linear of these heads, in their order."""
    linear = rows.linear
    b = Builder(graph, linear.node, name)
    columns, bias = rows.start + plan.columns(site.width), linear.bias(graph)
    weight = linear.weight(graph)[columns].contiguous()
    return b.linear(linear.x, weight, None if bias is None else bias[columns], label(rows.node))


def _fold_output(graph: Graph, site: Site, plan: Arrangement, result: torch.fx.Node, name: str) -> None:
    """The linear behind takes the columns of these heads."""
    output = site.output
    assert output is not None
    b = Builder(graph, output.node, name)
    flat = join(b, site, result, len(plan.heads))
    weight = output.weight(graph)[:, plan.columns(site.width)].contiguous()
    graph.replace(output.node, b.linear(flat, weight, output.bias(graph), label(output.node)))
