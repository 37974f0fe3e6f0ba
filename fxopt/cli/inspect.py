"""`fxopt inspect`: where a model's time goes on a target."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output
from fxopt.report import units

if TYPE_CHECKING:
    from fxopt.cost_model.roofline import GraphPrediction, NodePrediction
    from fxopt.ir.graph import Graph

Row = tuple[str, ...]
_FAILURES = 5  # that are shown


def inspect(
    model: options.Model,
    target: options.Target = "host",
    top: Annotated[int, typer.Option(help="So many of the most expensive nodes; 0: all.", metavar="COUNT", min=0)] = 20,
    input_shape: options.InputShape = None,
    threads: options.Threads = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Predict the cost of every node: operations, bytes, time, and what bounds it."""
    out = Output(json)
    require_model(model)
    shapes, cores = options.shapes_from(input_shape), options.threads_from(threads)
    import fxopt
    from fxopt.ir.graph import label
    from fxopt.ir.views.quantized import quantized_operators
    from fxopt.report.text import table

    graph = fxopt.capture(str(model))
    found = fxopt.predict(graph, target, input_shapes=shapes, threads=cores)
    quantised = list(quantized_operators(graph))
    out.json(
        {
            "inputs": [str(spec) for spec in graph.inputs],
            "outputs": [str(spec) for spec in graph.outputs],
            "notes": notes(graph),
            "quantized": {label(view.node): str(view) for view in quantised},
        }
        | asdict(found)
    )
    out.print(f"inputs: {'; '.join(map(str, graph.inputs))}\noutputs: {'; '.join(map(str, graph.outputs))}")
    out.print(table(("operator", "nodes", "time", "share"), by_operator(found), right=(1, 2, 3)))
    for text, count in Counter(map(str, quantised)).items():
        out.print(f"quantised already: {count} operator{'s' if count > 1 else ''} with {text}")
    for note in notes(graph):
        out.print(f"note: {note}")
    headers = ("node", "operator", "time", "share", "bound by", "operations", "bytes", "operations/byte")
    ranked = sorted(found.rows, key=lambda row: -row.prediction.seconds)
    shown = ranked[:top] if top else ranked
    out.print(table(headers, map(node_row, shown), right=(2, 3, 5, 6, 7)))
    if len(shown) < len(ranked):
        out.print(f"... and {len(ranked) - len(shown)} cheaper nodes; --top 0 shows all")
    total = found.total
    interval = f"{units.seconds(total.low)} to {units.seconds(total.high)}"
    out.print(
        f"{len(ranked)} operators, {units.count(found.macs)} multiply-adds, weights {units.size(found.weight_bytes)}; "
        f"predicted {units.seconds(total.seconds)} on {target} ({interval}), mostly {total.bound}-bound"
    )


def notes(graph: Graph) -> list[str]:
    """What is wrong with the model, or not known of it, as far as the figures depend on it."""
    from fxopt.frontends.infer_types import type_fault
    from fxopt.frontends.onnx import foreign_operators
    from fxopt.ir.graph import label

    failed = [node for node in graph.calls() if "failure" in node.meta]
    found = []
    if graph.model is not None:
        fault = type_fault(graph)
        found = [foreign_operators(graph), f"types do not agree, as ONNX infers them: {fault}" if fault else ""]
    found += [f"node {label(node)!r} {node.meta['failure']}" for node in failed[:_FAILURES]]
    if len(failed) > _FAILURES:
        found.append(f"... and {len(failed) - _FAILURES} nodes more that do not take their inputs")
    return [text for text in found if text]


def by_operator(found: GraphPrediction) -> list[Row]:
    """One row per kind of operator, the most expensive first."""
    kinds: dict[str, list[NodePrediction]] = {}
    for row in found.rows:
        kinds.setdefault(row.op, []).append(row)
    sums = {op: sum(row.prediction.seconds for row in rows) for op, rows in kinds.items()}
    return [
        (op, str(len(kinds[op])), units.seconds(sums[op]), f"{100 * sum(row.share for row in kinds[op]):.1f} %")
        for op in sorted(sums, key=lambda op: -sums[op])
    ]


def node_row(row: NodePrediction) -> Row:
    """One node as cells."""
    intensity = f"{row.cost.flops / row.cost.bytes:.1f}" if row.cost.bytes else "-"
    return (
        row.node,
        row.op,
        units.seconds(row.prediction.seconds),
        f"{100 * row.share:.1f} %",
        row.prediction.bound,
        units.count(row.cost.flops),
        units.size(row.cost.bytes),
        intensity,
    )
