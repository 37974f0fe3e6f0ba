"""Graphs of both dialects, and what must hold after every exact pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import fx

from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends import torch_export
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.dtypes import to_numpy
from fxopt.ir.onnx.export import to_model
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.shapes import infer, update
from fxopt.ir.verify import changed_nodes, check_output_types, output_types, snapshot, verify_structure
from fxopt.passes.base import Context, ExactPass
from fxopt.testing import PLAIN_CPU, assert_no_worse

aten = torch.ops.aten


def context(**options: Any) -> Context:
    """A context with an empty ledger."""
    return Context(PLAIN_CPU, **options)


def onnx_graph(
    text: str, opset: int = 20, sizes: dict[str, int] | None = None, check: bool = True, **constants: Any
) -> Graph:
    """A graph from `g (float[2] x) => (float[2] y) { ... }`; constants are initializers, nodes get names."""
    body = onnx.parser.parse_graph(text)
    for node in body.node:
        node.name = node.name or f"n_{next(name for name in node.output if name)}"
    for name, value in constants.items():
        array = to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        body.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    domains = sorted({node.domain for node in body.node} | {""})
    imports = [helper.make_opsetid(domain, 1 if domain else opset) for domain in domains]
    model = helper.make_model(body, opset_imports=imports, ir_version=10)
    graph = onnx_frontend.load(model, check=check)
    infer(graph, sizes)
    return graph


class Calls(torch.nn.Module):
    """A module that computes `function(*inputs)`; tensors in `constants` are buffers."""

    def __init__(self, function: Callable[..., Any], **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Buffers are given by name."""
        return self.function(*inputs, **dict(self.named_buffers()))


def torch_graph(
    model: torch.nn.Module | Callable[..., Any], *inputs: torch.Tensor, dynamic: Any = None, **constants: Any
) -> Graph:
    """The exported graph of a module, or of a function of inputs and named constants."""
    if not isinstance(model, torch.nn.Module):
        model = Calls(model, **constants)
    return torch_export.load(model.eval(), inputs, dynamic)


def fx_graph(
    build: Callable[..., Any], *shapes: Sequence[int], dtype: torch.dtype = torch.float32, **constants: Any
) -> Graph:
    """A torch graph from `build(fx graph, *inputs, **constants)`, where the frontend would clean up too much."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fxopt.ir.graph import ValueSpec

    body, root, mode = fx.Graph(), torch.nn.Module(), FakeTensorMode()
    inputs = []
    for index, shape in enumerate(shapes):
        inputs.append(body.placeholder(f"x{index}"))
        inputs[-1].meta["val"] = mode.from_tensor(torch.empty(*shape, dtype=dtype))
    nodes = {}
    for name, value in constants.items():
        root.register_buffer(name, value)
        nodes[name] = body.get_attr(name)
    results = build(body, *inputs, **nodes)
    body.output(results if isinstance(results, tuple) else (results,))
    specs = tuple(ValueSpec(f"x{index}", dtype, tuple(shape)) for index, shape in enumerate(shapes))
    count = len(body.output_node().args[0])  # type: ignore[arg-type]
    graph = Graph(body, root, "torch", specs, tuple(ValueSpec(f"y{index}", None, None) for index in range(count)))
    infer(graph)
    return graph


def operators(graph: Graph) -> list[str]:
    """The operators in execution order, by their short names; `getitem` left out."""
    names = []
    for node in graph.fx.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        target: Any = node.target
        names.append(target.op_type if isinstance(target, OnnxOp) else target._schema.name.removeprefix("aten::"))
    return names


def constants(graph: Graph) -> list[str]:
    """The names of the constants in an ONNX file that the graph gives."""
    return sorted(initializer.name for initializer in to_model(graph).graph.initializer)


def refusals(ctx: Context) -> list[str]:
    """The reasons in the ledger."""
    return [verdict.reason for verdict in ctx.ledger.select(outcome="refused")]


def applied(
    step: ExactPass,
    graph: Graph,
    samples: Sequence[Sequence[Any]] = (),
    ctx: Context | None = None,
    factor: float = 2.0,
) -> tuple[Graph, int]:
    """A copy after the pass, and the number of changes; checks all that holds for every exact pass.

    The graph is well formed, types of outputs are unchanged, a second run changes nothing, before and after types are
    derived anew; numbers are no worse; an ONNX graph gives a file that the checker accepts, with the same signature,
    which ONNX Runtime runs no worse.
    """
    ctx = context() if ctx is None else ctx
    after = graph.copy()
    before, types = snapshot(after), output_types(after)
    count = step.run(after, ctx)
    after.fx.lint()
    changed = changed_nodes(after, before)
    assert bool(changed or len(before) != len(after.fx.nodes)) == bool(count), f"{count} changes, {changed}"
    for _, value in after.root.named_buffers():
        assert not isinstance(value, torch.nn.Parameter)
    rows = len(ctx.ledger.verdicts)
    assert step.run(after, ctx) == 0, "a second run changes something"
    verify_structure(after, changed)
    check_output_types(after, types)
    update(after, changed)
    assert step.run(after, ctx) == 0, "a second run changes something once types are known"
    assert len(ctx.ledger.verdicts) == rows or not count, "a second run repeats its refusals"
    if samples:
        assert_no_worse(graph, after, samples, factor=factor)
    if graph.origin == "onnx":
        check_onnx(graph, after, samples, factor)
    return after, count


def check_onnx(before: Graph, after: Graph, samples: Sequence[Sequence[Any]], factor: float = 2.0) -> None:
    """Both graphs as files: valid, of the same signature, and no worse in ONNX Runtime."""
    files = [to_model(before), to_model(after)]
    onnx.checker.check_model(files[1], full_check=True)
    for side in ("input", "output"):
        old, new = ([value.SerializeToString() for value in getattr(file.graph, side)] for file in files)
        assert old == new, f"{side}s changed"
    used = {name for node in files[1].graph.node for name in node.input}
    results = {value.name for value in files[1].graph.output}
    if not any(attribute.HasField("g") for node in files[1].graph.node for attribute in node.attribute):
        kept = {initializer.name for initializer in files[0].graph.initializer}
        unused = {initializer.name for initializer in files[1].graph.initializer} - used - results - kept
        assert not unused, f"unused new initializers {unused}"
    for sample in samples:
        exact = before.run(sample, widen=True)
        old, new = run_file(files[0], sample), run_file(files[1], sample)
        if old is None or new is None:
            continue
        for wide, was, now in zip(exact, old, new, strict=True):
            assert was.dtype == now.dtype and was.shape == now.shape
            if not np.issubdtype(now.dtype, np.floating):
                assert np.array_equal(was, now)
                continue
            oracle = np.asarray(wide.double() if isinstance(wide, torch.Tensor) else wide, dtype=np.float64)
            unit = np.finfo(now.dtype).eps * np.abs(oracle[np.isfinite(oracle)]).max(initial=0)
            apart = [np.abs(value.astype(np.float64) - oracle) for value in (was, now)]
            worst = [np.nan_to_num(difference, nan=0.0, posinf=0.0).max(initial=0) for difference in apart]
            assert worst[1] <= factor * max(worst[0], 4 * unit), f"ONNX Runtime: {worst[1]}, was {worst[0]}"
            assert np.array_equal(np.isnan(was), np.isnan(now))


def run_file(model: onnx.ModelProto, sample: Sequence[Any]) -> list[np.ndarray] | None:
    """The outputs in ONNX Runtime without its own rewrites; None when it has no kernel for a type."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error) or "Could not find an implementation" in str(error):
            return None
        raise
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, {name: to_numpy(value) for name, value in zip(names, sample, strict=True)}))


def samples_of(graph: Graph, count: int = 2, seed: int = 0, **sizes: int) -> list[list[torch.Tensor]]:
    """Random inputs: normal floats with a zero of each sign among them, small integers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        sample = []
        for spec in graph.inputs:
            assert spec.dtype is not None and spec.shape is not None
            shape = [sizes.get(dim, 3) if isinstance(dim, str) else int(dim or 0) for dim in spec.shape]
            if spec.dtype.is_floating_point:
                value = torch.randn(shape, generator=generator).to(spec.dtype)
                value.reshape(-1)[:2] = torch.tensor([-0.0, 0.0])[: value.numel()]
            else:
                value = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
            sample.append(value)
        found.append(sample)
    return found


def bits(graph: Graph, sample: Sequence[Any]) -> list[bytes]:
    """The outputs bit for bit."""
    return [value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for value in graph.run(sample)]


def assert_same_bits(before: Graph, after: Graph, samples: Sequence[Sequence[Any]]) -> None:
    """Not a single bit changed."""
    for sample in samples:
        assert bits(before, sample) == bits(after, sample)


both_floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
