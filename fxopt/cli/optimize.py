"""`fxopt optimize`: the whole compiler on one model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fxopt.cli import options
from fxopt.cli.output import Output, check_destination, write_text
from fxopt.cli.progress import ProgressReporter
from fxopt.errors import FxoptError, InvalidModel, InvalidOption
from fxopt.ir.folders import check_folder

if TYPE_CHECKING:
    from fxopt.ir.ledger import Ledger
    from fxopt.report.report import Report


def optimize(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write; without it nothing is written.", show_default=False),
    ] = None,
    target: options.Target = "host",
    passes: options.Passes = None,
    calibration: options.Calibration = None,
    budget: options.Budget = "0.02",
    objective: options.Objective = "latency",
    evaluate: options.Evaluate = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    input_shape: options.InputShape = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    guard_seconds: Annotated[float, typer.Option(min=0.0, help="Time for measuring what pays.")] = 10.0,
    force: Annotated[
        bool, typer.Option("--force", help="Keep the result, whatever is measured or predicted for the whole model.")
    ] = False,
    require_speedup: Annotated[
        float | None,
        typer.Option(min=0.0, help="Exit with 1 and write nothing when the result is not so many times faster."),
    ] = None,
    require_pass: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 and write nothing when this pass changed nothing; repeatable.", metavar="NAME"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and price only: rewrite, measure and write nothing.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write report and ledger as one HTML file.", metavar="FILE.html")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="State of the calibration: a run that was cut off goes on from it.", metavar="FILE.npz"),
    ] = None,
    custom_ops: options.CustomOps = False,
    buckets: options.Buckets = None,
    weights: Annotated[
        Literal["embedded", "external"] | None,
        typer.Option(
            help="For WebAssembly and ARM: weights in the library (default) or in a file beside it.",
            show_default=False,
        ),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass into this folder.", metavar="FOLDER")
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Make a model faster on a target within an accuracy budget, and say what was done, what was not, and why."""
    out = Output(json)
    require_model(model)
    _check_files(model, output, report, dump)
    if resume is not None and resume.is_dir():
        raise InvalidOption(
            f"--resume {resume} is a folder; expected a file that is written as the calibration proceeds"
        )
    if dry_run:
        _check_dry_run(
            {
                "--output": output,
                "--report": report,
                "--dump": dump,
                "--require-speedup": require_speedup,
                "--resume": resume,
                "--custom-ops": custom_ops or None,
            }
        )
    planning: dict[str, Any] = {
        "calibration": calibration,
        "budget": options.budget_from(budget),
        "objective": objective,
        "evaluate": _metric(evaluate),
        "passes": options.passes_from(passes),
        "backend": backend,
        "include": include,
        "exclude": exclude,
        "input_shapes": options.shapes_from(input_shape),
        "threads": options.threads_from(threads),
        "seed": seed,
        "buckets": options.buckets_from(buckets),
        "weights": weights,
    }
    require_pass = _known_passes(require_pass or [], planning["passes"])
    import fxopt

    if dry_run:
        with ProgressReporter() as progress:
            ledger = fxopt.explain(str(model), target, **planning, progress=progress)
        _show_plan(out, ledger)
        return
    with ProgressReporter() as progress:
        result = fxopt.optimize(
            str(model),
            target,
            **planning,
            force=force,
            require_speedup=require_speedup,
            require_passes=tuple(require_pass),
            guard_seconds=guard_seconds,
            dump=dump,
            resume=resume,
            custom_ops=custom_ops,
            progress=progress,
        )
    failure = result.unmet
    if output is not None and not failure:
        result.save(output)
    _show(out, result.report, result.ledger, model, output, report, failure)
    if failure:
        raise typer.Exit(1)


def require_model(path: Path) -> None:
    """Raise when there is no model file: before the slow imports."""
    if path.is_dir():
        raise InvalidModel(f"{path} is a folder; expected an ONNX model file")
    if not path.exists():
        there = sorted(other.stem for other in path.parent.glob("*.onnx")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.stem, there, n=3) or there[:5]
        hint = f"; there is {', '.join(f'{stem}.onnx' for stem in near)}" if near else ""
        raise InvalidModel(f"{path}: no such file; expected an ONNX model{hint}")


def _check_files(model: Path, output: Path | None, report: Path | None, dump: Path | None) -> None:
    """What would fail after minutes of work fails now."""
    if output is not None and output.suffix not in ("", ".onnx"):
        raise InvalidOption(
            f"--output {output}: expected a name that ends in .onnx, or one without a suffix for a folder"
        )
    if output is not None and output.suffix:
        check_destination(output, "--output", model)
    elif output is not None:
        check_folder(output, "--output")
    if dump is not None and dump.exists() and not dump.is_dir():
        raise InvalidOption(f"--dump {dump} is a file; expected a folder")
    if report is not None:
        check_destination(report, "--report", model)
    if output is not None and report is not None and output.absolute() == report.absolute():
        raise InvalidOption(f"--output and --report are both {output}")


def _check_dry_run(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise InvalidOption(f"--dry-run rewrites, measures and writes nothing; leave {option} out")


def _metric(text: str | None) -> Callable[[Any], float] | None:
    """The function of --evaluate, whose failures are the user's to mend."""
    if text is None:
        return None
    from fxopt.catalog import function_from_text

    function = function_from_text(text)

    def metric(model: Any) -> float:
        try:
            value = float(function(model))
        except FxoptError:
            raise
        except Exception as error:
            raise InvalidOption(f"--evaluate {text} failed: {type(error).__name__}: {error}") from error
        if math.isnan(value):
            raise InvalidOption(f"--evaluate {text} gave NaN; expected a number, higher is better")
        return value

    return metric


def _known_passes(names: list[str], given: list[Any] | None) -> list[str]:
    """The names with dashes.

    Raises:
        UnknownName: neither the catalogue nor `-p` has such a pass.
    """
    if not names:
        return []
    from fxopt.catalog import canonical, pass_names
    from fxopt.errors import unknown

    known = {*pass_names(), *(item.name for item in given or ())}
    for name in names:
        if name.replace("_", "-") not in known:
            raise unknown("pass", name, known)
    return [canonical(name) for name in names]


def _show_plan(out: Output, ledger: Ledger) -> None:
    from rich.console import Group

    from fxopt.report.text import render_reasons

    out.print(Group(*render_reasons(ledger)))
    out.print("dry run: nothing was rewritten, measured or written")
    out.json({"ledger": ledger.to_json()})


def _show(
    out: Output, report: Report, ledger: Ledger, model: Path, output: Path | None, html: Path | None, failure: str
) -> None:
    from fxopt.report.text import render_report

    if html is not None:
        from fxopt.report.html import to_html

        write_text(html, to_html(report, ledger, model.name))
    out.json(
        {
            "model": str(model),
            "output": None if output is None or failure else str(output),
            "failed": failure or None,
            "report": report.to_json(),
            "ledger": ledger.to_json(),
        }
    )
    out.print(render_report(report, ledger))
    if failure:
        out.print(f"failed: {failure}; no model was written")
    elif output is None:
        out.print("no model was written: give --output FILE")
    else:
        out.print(f"written: {output}")
