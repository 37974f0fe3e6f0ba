"""Options that several commands share, and the conversion of their texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fxopt.config import Config
from fxopt.errors import InvalidOption

if TYPE_CHECKING:
    from fxopt.passes.base import Pass

Model = Annotated[Path, typer.Argument(help="The model: an ONNX file.", show_default=False)]
Target = Annotated[
    str, typer.Option("--target", "-t", help="Where it will run; `fxopt targets` lists them.", metavar="NAME")
]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        "--passes",
        "-p",
        help="Consider only this lossy pass, or convert the model with it first (`dequantize`): NAME, "
        "NAME{option=value,...} or ./file.py:Class{...}; repeatable. "
        "`none`: change nothing. Default: the planner's choice among all.",
        metavar="PASS",
        show_default=False,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Sample inputs: an .npz (one array per input, samples along axis 0), an .npy, a .jsonl or .json of rows "
        "(each an object of numbers by input name), a folder of them, or `random`.",
        metavar="DATA",
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="Largest loss: noise to signal of the outputs, or drop of the metric of --evaluate. `none`: no limit.",
        metavar="NUMBER",
    ),
]
Objective = Annotated[Literal["latency", "size"], typer.Option(help="What must improve.")]
CustomOps = Annotated[
    bool,
    typer.Option(
        "--custom-ops", help=r"Use own kernels where faster: writes a library beside the file; needs fxopt\[tvm]."
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        help="The metric: a function from a callable model to a number, higher is better.", metavar="FILE.py:FUNCTION"
    ),
]
Include = Annotated[str | None, typer.Option(help="Apply lossy passes only to nodes that match.", metavar="REGEX")]
Exclude = Annotated[str | None, typer.Option(help="Leave the nodes that match as they are.", metavar="REGEX")]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        help="Sizes for a model with dynamic dimensions, as in x:1,3,224,224; repeatable.", metavar="NAME:SIZES"
    ),
]
Buckets = Annotated[
    list[str] | None,
    typer.Option(
        help="For WebAssembly and ARM: sizes of a dynamic dimension, as in batch=1,4; repeatable. "
        "An entry point is compiled for each combination.",
        metavar="DIMENSION=SIZES",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="Instead of the target's own: NAME or NAME{option=value}; `fxopt backends` lists them.", metavar="NAME"
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads to run and measure with.", metavar="COUNT")]
Seed = Annotated[int, typer.Option(help="Of everything random.", metavar="NUMBER")]
Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON, `-` to stdout.", metavar="FILE|-")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Inputs: an .npz, .npy, .jsonl or .json; a folder; default: random.", metavar="DATA", show_default=False
    ),
]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for measuring.", metavar="NUMBER")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def threads_from(threads: int | None) -> int | None:
    """The option, else FXOPT_THREADS."""
    if threads is not None and threads < 1:
        raise InvalidOption(f"--threads {threads}: expected 1 or more")
    return threads if threads is not None else Config.from_environment().threads


def budget_from(text: str) -> float | None:
    """`0.02` or `none`."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidOption(f"--budget {text}: expected a number of 0 or more, or 'none'")
    return value


def shapes_from(texts: Iterable[str] | None) -> dict[str, tuple[int | str | None, ...]] | None:
    """`x:1,3,224,224` (or `x:[1,3,224,224]`, `ids:batch,128`, `ids:?,128`) per input."""
    from fxopt.frontends.input_shapes import parse

    return parse(texts or ()) or None


def buckets_from(texts: Iterable[str] | None) -> dict[str, tuple[int, ...]] | None:
    """`batch=1,4` per dimension."""
    from fxopt.backends.tvm.buckets import parse_buckets

    return parse_buckets(texts or ()) or None


def passes_from(texts: Sequence[str] | None) -> list[Pass] | None:
    """The passes that `-p` names; None without `-p`, and none at all for `-p none`."""
    if not texts:
        return None
    if list(texts) == ["none"]:
        return []
    from fxopt.catalog import pass_from_text

    return [pass_from_text(text) for text in texts]


def pattern_from(option: str, text: str | None) -> re.Pattern[str] | None:
    """The regular expression of an option."""
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise InvalidOption(f"{option} {text}: not a regular expression: {error}") from error
