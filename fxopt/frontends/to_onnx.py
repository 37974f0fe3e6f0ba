"""PyTorch -> ONNX with torch's own exporter: the graph that ONNX Runtime is planned on, names and dimensions kept.

Opset 23 keeps attention and normalisation as one operator each. Its exporter has faults that only show at run time
(`RotaryEmbedding` with a dynamic batch), so each form is run in ONNX Runtime and compared with the module before it is
taken; the next form is tried else.
"""

from __future__ import annotations

import ast
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch.export import ExportedProgram

from fxopt.errors import CaptureError
from fxopt.frontends import fxopt_nodes
from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends.capture.layout import free_of_layouts, is_about_layout
from fxopt.frontends.capture.program import Examples, Program, export, quiet
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.dtypes import from_numpy, to_numpy

Runner = Callable[[Graph, Sequence[torch.Tensor]], Sequence[torch.Tensor]]
FORMS = ((23, True), (20, True), (20, False))  # (opset, whether torch's optimiser runs), best first
SHARED_BYTES = 1024  # initializers of more bytes share the module's memory instead of being written to the message
BESIDE_BYTES = 1 << 26  # weights of more bytes lie beside the model that is verified: they are then not held twice
_PATH_KEY, _OLD_NAMES = "fxopt.from", re.compile(r"^(val_\d+|)$")
_ROUNDINGS = 16  # times the rounding error of the computation in torch that other orders of sums may make
_MAX_NOISE = {torch.float64: 1e-8, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def to_onnx(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Examples = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool | Runner = True,
) -> tuple[Graph, list[str]]:
    """The model as a graph of ONNX operators, and remarks for the user.

    Inputs carry the names of `forward`'s arguments, outputs those of its result ("output" when it has none), nodes the
    path of the module they came from. `fxopt.ir.onnx.export.to_model` or `save` make the file.

    Args:
        opset: None: the best one whose result is right.
        verify: run the result on the example inputs and compare with the module; a function runs it elsewhere than in
            ONNX Runtime.

    Raises:
        CaptureError: torch cannot trace or export the model, or every exported form computes something else.
        InvalidInput: the examples or `dynamic_shapes` do not fit the model's `forward`.
    """
    program = export(model, example_inputs, dynamic_shapes, kwargs)
    return onnx_graph_of(program, type(model).__name__, opset, verify=verify)


def onnx_graph_of(
    program: Program, name: str = "main", opset: int | None = None, *, verify: bool | Runner = True
) -> tuple[Graph, list[str]]:
    """`to_onnx` of a captured program."""
    forms = FORMS if opset is None else ((opset, True), (opset, False))
    runner = run_onnxruntime if verify is True else verify
    expected = program.run(program.examples) if runner else []
    notes: list[str] = []
    unproven: Graph | None = None
    cause: Exception | None = None
    for version, optimize in forms:
        form = f"opset {version}" if optimize else f"opset {version} without torch's optimiser"
        try:
            graph = _exported_in_any_layout(program, name, version, optimize)
        except Exception as error:
            cause = error
            notes.append(f"torch cannot export {name} to {form}: {_first_line(_root(error))}")
            continue
        if not runner:
            return graph, notes
        try:
            given = runner(graph, program.examples)
        except Exception as error:
            unproven = unproven or graph
            notes.append(f"{form} does not run on the example inputs: {_first_line(error)}")
            continue
        fault = difference(expected, given, program.outputs, partial(both_precisions, graph, program.examples))
        if not fault:
            return graph, [*notes, f"exported as {form}"] if notes else []
        notes.append(f"{form} computes something else than the module: {fault}")
    if unproven is not None:
        fault, remark = _verified_in_torch(unproven, program, expected)
        if not fault:
            return unproven, [*notes, remark]
        notes.append(f"the form that does not run there computes something else in torch: {fault}")
    if cause is not None:
        advice = (
            "To fix it: write the operator with others that have an ONNX form (mixtures of experts of Hugging Face: "
            "config._experts_implementation = 'batched_mm'), or choose another backend."
        )
        raise CaptureError("\n  ".join([f"{name} could not be exported to ONNX:", *notes, advice])) from cause
    raise CaptureError("\n  ".join([f"{name} could not be exported to ONNX:", *notes]))


def _root(error: BaseException) -> BaseException:
    """What the exporter's errors were raised from, at last."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _exported_in_any_layout(program: Program, name: str, opset: int, optimize: bool) -> Graph:
    try:
        return _exported(program, name, opset, optimize)
    except Exception as error:
        if not is_about_layout(_root(error)):
            raise
    free_of_layouts(program.exported)
    return _exported(program, name, opset, optimize)


def _exported(program: Program, name: str, opset: int, optimize: bool) -> Graph:
    own = fxopt_nodes.translations() if fxopt_nodes.holds(program.exported) else None
    with quiet():
        made = torch.onnx.export(
            program.exported,
            dynamo=True,
            opset_version=opset,
            optimize=optimize,
            verbose=False,
            external_data=False,
            custom_translation_table=own,
        )
    assert made is not None
    model = made.model
    model.graph.name = name
    _name_values(model.graph, program)
    _name_dimensions(model.graph, program)
    _name_nodes(model.graph, program.prefix)
    weights = _take_weights(model.graph)
    proto = onnx_ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    graph = onnx_frontend.load(proto, check=False, weights=weights)
    graph.call_spec = program.call
    if own is not None:
        fxopt_nodes.restore(graph)
    return graph


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """Every named value of the graph and of the graphs inside it."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type is onnx_ir.AttributeType.GRAPH:
                yield from _values(attribute.as_graph())
            elif attribute.type is onnx_ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _values(inner)


def _name_values(graph: onnx_ir.Graph, program: Program) -> None:
    """Inputs and outputs by the user's names, initializers by their state-dict names; other values make room."""
    wanted: dict[onnx_ir.Value, str] = dict(zip(graph.inputs, program.inputs, strict=True))
    results = [value for value in graph.outputs if value is not None]
    for value, name in zip(results, program.outputs, strict=True):
        wanted.setdefault(value, name)  # a result that is an input, or is returned twice, keeps its first name
    for value in graph.initializers.values():
        wanted.setdefault(value, _weight_name(value, program.prefix))
    others = [value for value in dict.fromkeys(_values(graph)) if value not in wanted]
    used: set[str] = set()
    renamed: dict[onnx_ir.Value, str] = {}
    for value, name in (*wanted.items(), *((value, value.name or "value") for value in others)):
        free, count = name, 1
        while free in used:
            count += 1
            free = f"{name}_{count}"
        used.add(free)
        renamed[value] = free
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for value, name in renamed.items():
        value.name = name
    for value in initializers:
        graph.initializers[str(value.name)] = value


def _weight_name(value: onnx_ir.Value, prefix: str) -> str:
    """The state-dict name; of a folded constant that of the weight it was made from."""
    name = str(value.name)
    source = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from")
    if source:
        weights = [part for part in ast.literal_eval(source) if not _OLD_NAMES.match(part)]
        if len(weights) == 1 and "." in weights[0]:
            name = f"{weights[0]}_folded"
    return name.removeprefix(prefix)


def _name_dimensions(graph: onnx_ir.Graph, program: Program) -> None:
    for value in _values(graph):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = onnx_ir.SymbolicDim(program.dimensions.named(str(dim.value)))


def _name_nodes(graph: onnx_ir.Graph, prefix: str) -> None:
    """Name nodes `module.path/Operator`; drop torch's notes, which hold paths of this machine."""
    used: dict[str, int] = {}
    graph.metadata_props.clear()
    for value in _values(graph):
        value.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
        path = _module_path(node, prefix)
        name = f"{path}/{node.op_type}" if path else node.op_type
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        if path:
            node.metadata_props[_PATH_KEY] = path


def _module_path(node: onnx_ir.Node, prefix: str) -> str:
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes") or "[]")
    inner = f"{scopes[-2]}." if len(scopes) > 1 else ""
    path = inner.removeprefix(prefix).removesuffix(".") if inner.startswith(prefix) else ""
    return re.sub(r"@\d+$", "", path)


def _take_weights(graph: onnx_ir.Graph) -> dict[str, torch.Tensor]:
    """The large initializers, taken out of the model: as torch tensors over the memory that they already have."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= SHARED_BYTES:
            continue
        raw: Any = getattr(tensor, "raw", None)
        if isinstance(raw, torch.Tensor):
            weights[name] = raw.detach()
        elif tensor.dtype.bitwidth >= 8 and tensor.dtype is not onnx_ir.DataType.STRING:
            weights[name] = _over(tensor.numpy())
        else:
            continue
        value.const_value = onnx_ir.ExternalTensor(
            "-", 0, tensor.nbytes, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
        )
    return weights


def _over(array: np.ndarray[Any, Any]) -> torch.Tensor:
    native = array.dtype.kind in "biufc" and array.flags.writeable and min((0, *array.strides)) >= 0
    return torch.from_numpy(array) if native else from_numpy(array)


def run_onnxruntime(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs, computed by ONNX Runtime on the CPU."""
    import onnxruntime

    from fxopt.ir.onnx.export import save

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(graph, path, external=graph.size_bytes() > BESIDE_BYTES)
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    feed = {spec.name: to_numpy(tensor) for spec, tensor in zip(graph.inputs, inputs, strict=True)}
    return [from_numpy(np.asarray(result)) for result in session.run(None, feed)]


def _verified_in_torch(graph: Graph, program: Program, expected: Sequence[Any]) -> tuple[str, str]:
    """What is wrong with a graph that its runner cannot run ("" for nothing), and what to say of it else.

    ONNX Runtime has no bfloat16 kernels on most machines, for example; the operators' definitions in torch do run.
    """
    try:
        with torch.no_grad():
            given = graph.run(list(program.examples))
    except Exception as error:
        return "", f"the exported graph could not be verified: torch does not run it either ({_first_line(error)})"
    fault = difference(expected, given, program.outputs, partial(both_precisions, graph, program.examples))
    return fault, "verified with the definitions of its operators in torch instead"


def both_precisions(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[tuple[Any, Any]]:
    """Per output the graph's results in torch, in float64 and in its own types; [] where torch cannot run it."""
    try:
        with torch.no_grad():
            return list(zip(graph.run(list(inputs), widen=True), graph.run(list(inputs)), strict=True))
    except Exception:  # then the outputs are judged without
        return []


def difference(
    expected: Sequence[Any],
    given: Sequence[torch.Tensor],
    names: Sequence[str],
    precisions: Callable[[], Sequence[tuple[Any, Any]]] | None = None,
) -> str:
    """What is wrong with the outputs; "" when they are those of the module up to rounding.

    Noise is judged by the signal. An output that is zero up to rounding has none: where the noise is too large,
    `precisions` (each output in float64 and in the model's types) tells the rounding error of the computation itself,
    and `expected` and `given` have to be as near to float64 as that, up to a factor.
    """
    for index, (name, right, value) in enumerate(zip(names, expected, given, strict=True)):
        if not isinstance(right, torch.Tensor):
            if int(value) != int(right):
                return f"output {name!r} is {int(value)}, not {int(right)}"
            continue
        right = right.detach().cpu()
        if right.shape != value.shape or right.dtype != value.dtype:
            return f"output {name!r} is {value.dtype}{list(value.shape)}, not {right.dtype}{list(right.shape)}"
        if not right.dtype.is_floating_point:
            if not torch.equal(right, value):
                return f"output {name!r} differs in {int((right != value).sum())} of {right.numel()} elements"
            continue
        wide, found = right.double(), value.double()
        finite = wide.isfinite()
        if not torch.equal(finite, found.isfinite()):
            return f"output {name!r} is not finite in other places"
        noise = float((wide - found)[finite].square().sum() / wide[finite].square().sum().clamp(min=1e-30))
        if noise <= _MAX_NOISE.get(right.dtype, 1e-2):
            continue
        runs = precisions() if precisions is not None else ()
        if index >= len(runs) or not _is_rounding(wide, found, *runs[index]):
            return f"output {name!r} has a noise-to-signal ratio of {noise:.1e}"
    return ""


def _is_rounding(expected: torch.Tensor, given: torch.Tensor, exact: Any, rounded: Any) -> bool:
    """True when two results are no further from the exact one than a few times what rounding makes of it."""
    if not isinstance(exact, torch.Tensor) or exact.shape != expected.shape or not exact.isfinite().all():
        return False
    exact = exact.double()
    unit = float((rounded.double() - exact).square().sum())
    errors = [float((result - exact).square().sum()) for result in (expected, given)]
    return unit > 0 and max(errors) <= _ROUNDINGS**2 * unit
