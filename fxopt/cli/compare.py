"""`fxopt compare`: accuracy and speed of two models on the same data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output
from fxopt.cli.progress import ProgressReporter


def compare(
    a: Annotated[Path, typer.Argument(help="The model to compare with: an ONNX file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other model: an ONNX file.", show_default=False)],
    data: options.Data = None,
    seconds: options.Seconds = 5.0,
    max_error: Annotated[
        float | None, typer.Option(help="Exit with 1 when the noise to signal is larger.", metavar="NUMBER", min=0.0)
    ] = None,
    min_ratio: Annotated[
        float | None, typer.Option(help="Exit with 1 when B is not so many times faster.", metavar="NUMBER", min=0.0)
    ] = None,
    input_shape: options.InputShape = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Compare outputs and time of two models, run by turns on the same data."""
    out = Output(json)
    require_model(a)
    require_model(b)
    shapes = options.shapes_from(input_shape)
    import fxopt
    from fxopt.report import units
    from fxopt.report.text import table

    with ProgressReporter() as progress:
        progress("comparing", 0, 0)
        found = fxopt.compare(
            str(a), str(b), data, threads=options.threads_from(threads), seed=seed, seconds=seconds, input_shapes=shapes
        )
    failure = ""
    if max_error is not None and not found.error.noise_to_signal <= max_error:
        failure = f"--max-error {max_error:g}: the noise to signal is {found.error.noise_to_signal:.3g}"
    elif min_ratio is not None and not found.ratio >= min_ratio:
        failure = f"--min-ratio {min_ratio:g}: measured {found.ratio:.2f}"
    out.json({**asdict(found), "failed": failure or None})
    rows = [
        ("time of A", units.seconds(found.a_seconds)),
        ("time of B", units.seconds(found.b_seconds)),
        ("B is faster by", f"{units.ratio(found.ratio)} ({found.low:.2f} to {found.high:.2f}), {found.bursts} bursts"),
        ("noise to signal of B", f"{found.error.noise_to_signal:.3g}"),
        ("relative L2 of B", f"{found.error.relative_l2:.3g}"),
        ("cosine", f"{found.error.cosine:.6f}"),
        ("samples", str(found.samples)),
    ]
    out.print(table(("", ""), rows))
    for note in found.notes:
        out.print(f"note: {note}")
    if failure:
        out.print(f"failed: {failure}")
        raise typer.Exit(1)
