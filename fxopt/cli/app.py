"""The commands and their order in the help."""

from __future__ import annotations

from typing import Annotated

import typer

from fxopt.cli import bench, compare, convert, explain, inspect, lists, optimize, predict


def _dashes(text: str) -> str:
    return text.replace("_", "-")


app = typer.Typer(
    help="Make a model faster on a target, and show what was done, what was not, and why.\n\n"
    "`fxopt MODEL -o OUT` is short for `fxopt optimize MODEL -o OUT`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashes},
)


def _version(wanted: bool) -> None:
    if wanted:
        from fxopt import __version__

        typer.echo(f"fxopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


app.command("optimize")(optimize.optimize)
app.command("inspect")(inspect.inspect)
app.command("explain")(explain.explain)
app.command("predict")(predict.predict)
app.command("compare")(compare.compare)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)
app.command("passes")(lists.passes)
app.command("targets")(lists.targets)
app.command("backends")(lists.backends)
app.command("ops")(lists.ops)

COMMANDS = frozenset(command.name for command in app.registered_commands if command.name)
