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
    from fxopt.passes.base import Pass


def explain(
    model: options.Model,
    node: Annotated[str | None, typer.Option(help="Only nodes whose names match.", metavar="REGEX")] = None,
    pass_name: Annotated[
        str | None,
        typer.Option(
            "--pass", "-p", help="Only verdicts of this pass: NAME or, as in optimize, NAME{option=value,...}.",
            metavar="PASS",
        ),
    ] = None,
    target: options.Target = "host",
    calibration: options.Calibration = None,
    budget: options.Budget = "0.02",
    objective: options.Objective = "latency",
    custom_ops: options.CustomOps = False,
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
        passes, pass_name = _asked_for(pass_name)
    pattern = options.pattern_from("--node", node)
    shapes, limit = options.shapes_from(input_shape), options.budget_from(budget)
    import fxopt
    from fxopt.report.text import render_verdicts

    graph = fxopt.capture(str(model))
    with ProgressReporter() as progress:
        ledger = fxopt.explain(
            str(model),
            target,
            calibration=calibration,
            budget=limit,
            objective=objective,
            custom_ops=custom_ops,
            passes=passes,
            input_shapes=shapes,
            backend=backend,
            threads=options.threads_from(threads),
            progress=progress,
        )
    _check_matches(graph, ledger, pattern)
    rows = verdicts(graph, ledger, pattern, pass_name)
    out.json({"notes": ledger.notes, "verdicts": [vars(row) for row in rows]})
    out.print(render_verdicts(rows))
    for note in ledger.notes:
        out.print(f"note: {note}")
    if not rows:
        who = f"pass {pass_name} has no" if pass_name else "no pass has a"
        out.print(f"{who} verdict on this model: it holds none of the operators that passes work on")


def _asked_for(text: str) -> tuple[list[Pass] | None, str]:
    """The passes to consider, None for the usual ones, and the name under which this one's verdicts are."""
    from fxopt.catalog import canonical, entries, pass_from_text, pass_names
    from fxopt.passes.base import LossyPass
    from fxopt.passes.pipelines import lossy_passes

    has_options, in_file = "{" in text, ".py" in text
    if not has_options and not in_file and canonical(text) not in entries("pass"):
        raise unknown("pass", text, pass_names())
    step = pass_from_text(text)
    only_when_asked = isinstance(step, LossyPass) and type(step) not in {type(usual) for usual in lossy_passes()}
    return ([step] if has_options or in_file or only_when_asked else None), step.name


def _check_matches(graph: Graph, ledger: Ledger, pattern: re.Pattern[str] | None) -> None:
    """Operators of the model, and those that passes made of them."""
    from fxopt.ir.graph import label

    names = [*(label(node) for node in graph.calls()), *(row.node for row in ledger.verdicts)]
    if pattern is not None and not any(map(pattern.search, names)):
        known = list(dict.fromkeys(names))
        raise UnknownName(f"--node {pattern.pattern} matches no node: {unknown('node', pattern.pattern, known)}")


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
