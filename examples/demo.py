"""Optimise the example models for this machine, and print what was gained, what was refused, and why.

`python examples/demo.py` (or `make demo`) takes a minute or two; the results are written to `out/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console

import fxopt
from examples.calibration import calibration_inputs
from examples.evaluate import byte_lm_bits, digits_accuracy
from fxopt.cli.progress import ProgressReporter
from fxopt.report.html import to_html
from fxopt.report.text import render_report

MODELS = Path(__file__).parent / "models"
Metric = Callable[[Any], float]


def optimise(name: str, out: Path, metric: Metric, console: Console) -> tuple[float, float]:
    """Optimise one example model within the default budget; returns the metric of the file before and after."""
    source, result = MODELS / f"{name}.onnx", out / f"{name}.opt.onnx"
    data = out / f"{name}.calibration.npz"
    with data.open("wb") as file:
        np.savez(file, allow_pickle=False, **calibration_inputs(name))
    console.rule(f"{source.name} -> {result.name}")
    with ProgressReporter() as progress:
        model = fxopt.optimize(source, "host", calibration=data, progress=progress)
    model.save(result)
    (out / f"{name}.html").write_text(to_html(model.report, model.ledger, source.name))
    console.print(render_report(model.report, model.ledger))
    return metric(fxopt.load(source)), metric(fxopt.load(result))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

    before, after = optimise("byte-lm", options.out, byte_lm_bits, console)
    console.print(f"byte-lm, bits per byte of Python's documentation: {-before:.4f} before, {-after:.4f} after\n")
    before, after = optimise("digits-vit", options.out, digits_accuracy, console)
    console.print(f"digits-vit, correct on the test images: {before:.2f} % before, {after:.2f} % after\n")
    console.print(f"models, calibration data and reports (open the .html in a browser): {options.out}/")


if __name__ == "__main__":
    main()
