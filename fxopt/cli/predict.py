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
        typer.Option("--target", "-t", help="A target; repeatable. Default: host.", show_default=False),
    ] = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Predict the time of one run, with an interval, for each target."""
    raise NotImplementedError
