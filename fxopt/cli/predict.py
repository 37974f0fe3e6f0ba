"""`fxopt predict`: how fast a model will be on targets that need not be here."""

from __future__ import annotations

from typing import Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output


def predict(
    model: options.Model,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A target; repeatable. Default: host.", metavar="NAME", show_default=False),
    ] = None,
    input_shape: options.InputShape = None,
    threads: options.Threads = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Predict the time of one run on each target, with an interval and what the prediction is known to be worth."""
    out = Output(json)
    require_model(model)
    shapes, cores = options.shapes_from(input_shape), options.threads_from(threads)
    from fxopt.catalog import find_target

    known = {name: find_target(name) for name in dict.fromkeys(target or ["host"])}
    import fxopt
    from fxopt.report import units
    from fxopt.report.text import table

    graph = fxopt.capture(str(model))
    found = {name: fxopt.predict(graph, name, input_shapes=shapes, threads=cores) for name in known}
    out.json(
        [
            {
                "target": name,
                "seconds": row.total.seconds,
                "low": row.total.low,
                "high": row.total.high,
                "bound": row.total.bound,
                "macs": row.macs,
                "weight_bytes": row.weight_bytes,
                "error": known[name].error,
                "source": known[name].source,
            }
            for name, row in found.items()
        ]
    )
    rows = [
        (
            name,
            units.seconds(row.total.seconds),
            f"{units.seconds(row.total.low)} to {units.seconds(row.total.high)}",
            row.total.bound,
            known[name].error,
        )
        for name, row in found.items()
    ]
    out.print(table(("target", "time", "interval", "bound by", "predictions were checked on"), rows, right=(1,)))
