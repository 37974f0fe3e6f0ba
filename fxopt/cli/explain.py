"""`fxopt explain`: why each node is, or is not, optimised."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output
from fxopt.cli.progress import ProgressReporter
from fxopt.errors import UnknownName, unknown

if TYPE_CHECKING:
    from fxopt.ir.graph import Graph
    from fxopt.ir.ledger import Ledger, Verdict


def explain(
    model: options.Model,
    node: Annotated[str | None, typer.Option(help="Only nodes whose names match.", metavar="REGEX")] = None,
    pass_name: Annotated[str | None, typer.Option("--pass", help="Only verdicts of this pass.", metavar="NAME")] = None,
    target: options.Target = "host",
    calibration: options.Calibration = None,
    budget: options.Budget = "0.02",
    input_shape: options.InputShape = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Print the verdict of every pass on every node, with its reason."""
    out = Output(json)
    require_model(model)
    passes = None
    if pass_name is not None:
        from fxopt.catalog import canonical, entries, pass_names

        if canonical(pass_name) not in entries("pass"):
            raise unknown("pass", pass_name, pass_names())
        passes = _only(pass_name)
        pass_name = canonical(pass_name)
    pattern = options.pattern_from("--node", node)
    shapes, limit = options.shapes_from(input_shape), options.budget_from(budget)
    import fxopt
    from fxopt.report.text import render_verdicts

    graph = fxopt.capture(str(model))
    _check_matches(graph, pattern)
    with ProgressReporter() as progress:
        ledger = fxopt.explain(
            str(model),
            target,
            calibration=calibration,
            budget=limit,
            passes=passes,
            input_shapes=shapes,
            backend=backend,
            threads=options.threads_from(threads),
            progress=progress,
        )
    rows = verdicts(graph, ledger, pattern, pass_name)
    out.json({"notes": ledger.notes, "verdicts": [vars(row) for row in rows]})
    out.print(render_verdicts(rows))
    for note in ledger.notes:
        out.print(f"note: {note}")
    if not rows:
        who = f"pass {pass_name} has no" if pass_name else "no pass has a"
        out.print(f"{who} verdict on this model: it holds none of the operators that passes work on")


def _only(name: str) -> list[str] | None:
    """The pass alone, where it is a lossy one that is done only when it is asked for; None: the usual passes."""
    from fxopt.catalog import find_pass
    from fxopt.passes.base import LossyPass
    from fxopt.passes.pipelines import lossy_passes

    kind = find_pass(name)
    usual = {type(step) for step in lossy_passes()}
    return [name] if issubclass(kind, LossyPass) and kind not in usual else None


def _check_matches(graph: Graph, pattern: re.Pattern[str] | None) -> None:
    from fxopt.ir.graph import label

    names = [label(node) for node in graph.calls()]
    if pattern is not None and not any(map(pattern.search, names)):
        raise UnknownName(f"--node {pattern.pattern} matches no node: {unknown('node', pattern.pattern, names)}")


def verdicts(graph: Graph, ledger: Ledger, node: re.Pattern[str] | None, pass_name: str | None) -> list[Verdict]:
    """The ledger's rows; asked for certain nodes, also a row for each of those that no pass said anything about."""
    from fxopt.ir.graph import label
    from fxopt.ir.ledger import Verdict

    rows = list(ledger.select(node=node.pattern if node else None, pass_name=pass_name))
    if node is None:
        return rows
    named = {row.node for row in rows}
    for call in graph.calls():
        name = label(call)
        if node.search(name) and name not in named:
            kind = getattr(call.target, "op_type", None) or str(call.target)
            reason = f"no verdict for this {kind} node: it is not one of the operators that the pass works on"
            rows.append(Verdict(pass_name or "every pass", name, "no-match", reason))
    return rows
