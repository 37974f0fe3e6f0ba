"""The corpus as graphs of aten operators: entries of fixed sizes are exported together, which takes a tenth of the time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fxopt.frontends import torch_export
from fxopt.ir.graph import Graph, set_attribute
from fxopt.passes.base import Context
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from fxopt.testing import PLAIN_CPU
from tests.attention.entries import Entry
from tests.attention.sdpa import SDPA
from tests.attention.spelled import SPELLED
from tests.attention.unknown import UNKNOWN

ENTRIES = {entry.name: entry for entry in (*SPELLED, *SDPA, *UNKNOWN)}
assert len(ENTRIES) == len(SPELLED) + len(SDPA) + len(UNKNOWN), "names are unique"


class Together(nn.Module):
    """Several modules, each on inputs of its own."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(entry.module() for entry in entries)
        self.counts = [len(entry.sample()) for entry in entries]

    def forward(self, *x: torch.Tensor) -> list[Any]:
        found, start = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            y = part(*x[start : start + count])
            found.append(y if isinstance(y, tuple) else (y,))
            start += count
        return found


@cache
def captured(name: str) -> Graph:
    """The entry after the exact passes; do not change it, take a copy."""
    entry = ENTRIES[name]
    if not entry.dynamic:
        graph = together()[name]
    else:
        dynamic = {"x": tuple(entry.dynamic.get(index, {}) for index in range(len(entry.sample())))}
        graph = torch_export.load(entry.module(), entry.sample(), dynamic)
    PassManager(exact_pipeline()).run(graph, Context(PLAIN_CPU))
    return graph


@cache
def together() -> dict[str, Graph]:
    """Every entry of fixed sizes."""
    entries = [entry for entry in ENTRIES.values() if not entry.dynamic and "torch" in entry.only]
    samples = tuple(x for entry in entries for x in entry.sample())
    whole = torch_export.load(Together(entries).eval(), samples)
    found, first_input, first_output = {}, 0, 0
    with torch.no_grad():
        for entry in entries:
            y = entry.module()(*entry.sample())
            inputs = range(first_input, first_input + len(entry.sample()))
            outputs = range(first_output, first_output + (len(y) if isinstance(y, tuple) else 1))
            found[entry.name] = part_of(whole, inputs, outputs)
            first_input, first_output = inputs.stop, outputs.stop
    return found


def part_of(whole: Graph, inputs: range, outputs: range) -> Graph:
    """What some outputs are made of, with names of its own."""
    wanted = [whole.result_nodes[index] for index in outputs]
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    fresh, root, copies = fx.Graph(), nn.Module(), {}
    for number, index in enumerate(inputs):
        source = whole.placeholders[index]
        copies[source] = fresh.placeholder(f"x_{number}")
        copies[source].meta = dict(source.meta)
    for node in whole.nodes:
        if node not in needed or node in copies or node.op == "placeholder":
            continue
        args, kwargs = (fx.map_arg(given, copies.__getitem__) for given in (node.args, node.kwargs))
        name = str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else None
        copies[node] = fresh.create_node(node.op, node.target, args, kwargs, name)
        copies[node].meta = dict(node.meta)
        if node.op == "get_attr":
            set_attribute(root, str(node.target), whole.attribute(str(node.target)))
    fresh.output(tuple(copies[node] for node in wanted))
    specs = tuple(whole.inputs[index] for index in inputs), tuple(whole.outputs[index] for index in outputs)
    return Graph(fresh, root, "torch", *specs)
