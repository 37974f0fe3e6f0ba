"""`fxopt bench`: medians of several models, and their ratios to the first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output
from fxopt.cli.progress import ProgressReporter


def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the one to compare with.")],
    data: options.Data = None,
    seconds: options.Seconds = 5.0,
    input_shape: options.InputShape = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Time models in interleaved bursts."""
    out = Output(json)
    for model in models:
        require_model(model)
    shapes = options.shapes_from(input_shape)
    import fxopt
    from fxopt.report import units
    from fxopt.report.text import table

    with ProgressReporter() as progress:
        progress("measuring", 0, 0)
        rows = fxopt.bench(
            [str(model) for model in models],
            data,
            threads=options.threads_from(threads),
            seconds=seconds,
            seed=seed,
            input_shapes=shapes,
        )
    out.json([asdict(row) for row in rows])
    shown = [
        (row.model, units.seconds(row.median), units.seconds(row.minimum), units.ratio(row.ratio), str(row.bursts))
        for row in rows
    ]
    headers = ("model", "median", "minimum", "faster than the first", "bursts")
    out.print(table(headers, shown, right=(1, 2, 3, 4)))
