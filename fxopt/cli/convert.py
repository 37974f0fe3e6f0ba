"""`fxopt convert`: a model at a newer operator set, or with other input shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli import options
from fxopt.cli.optimize import require_model
from fxopt.cli.output import Output, check_destination
from fxopt.errors import InvalidOption


def convert(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the model.", metavar="FILE.onnx")],
    opset: Annotated[
        int | None,
        typer.Option(help="The version of the ONNX operator set to convert to.", metavar="NUMBER", show_default=False),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes and names of an input's dimensions, as in x:1,3,224,224 or ids:batch,?; they are fixed in the "
            "result; repeatable.",
            metavar="NAME:DIMENSIONS",
            show_default=False,
        ),
    ] = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Write the model at a newer opset, and verify that it computes the same."""
    out = Output(json)
    require_model(model)
    if output.suffix != ".onnx":
        raise InvalidOption(f"--output {output}: expected a name that ends in .onnx")
    check_destination(output, "--output", model)
    if opset is None and not input_shape:
        raise InvalidOption("nothing to convert: give --opset NUMBER, --input-shape NAME:DIMENSIONS, or both")
    from fxopt.frontends.input_shapes import override, parse

    shapes = parse(input_shape or ())
    from fxopt.frontends.convert_graph import converted
    from fxopt.frontends.convert_opset import opset_of
    from fxopt.frontends.infer_types import type_fault
    from fxopt.frontends.onnx import foreign_operators, load
    from fxopt.ir.onnx.export import save

    graph = load(model)
    lines: list[str] = []
    source = target = opset_of(graph.model.proto) if graph.model is not None else 0
    changed: tuple[str, ...] = ()
    error: float | None = None
    if opset is not None:
        graph, result = converted(graph, opset)
        source, target, changed, error = result.source, result.target, result.changed, result.error
        lines.append(str(result))
    if shapes:
        override(graph, shapes)
        lines.append(f"inputs: {'; '.join(map(str, graph.inputs))}")
    save(graph, output)
    foreign, fault = foreign_operators(graph), type_fault(graph)
    notes = [foreign, f"types do not agree, as ONNX infers them: {fault}" if fault else ""]
    notes = [text for text in notes if text]
    out.json(
        {
            "output": str(output),
            "source_opset": source,
            "opset": target,
            "changed": list(changed),
            "error": error,
            "notes": notes,
            "inputs": [str(spec) for spec in graph.inputs],
            "outputs": [str(spec) for spec in graph.outputs],
        }
    )
    remarks = (*(f"  {entry}" for entry in changed), *(f"note: {text}" for text in notes))
    for line in (*lines, *remarks, f"written to {output}"):
        out.print(line)
