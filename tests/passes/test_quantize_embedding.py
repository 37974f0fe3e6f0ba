"""quantize-embedding: it fires, it refuses with a reason, its numbers are those of numpy in float64."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.backends.onnxruntime.session import make_session
from fxopt.cost_model.roofline import predict
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidOption
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.ir.op import all_ops
from fxopt.ir.ops.embedding_w8 import embedding_w8
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.pipelines import lossy_passes
from fxopt.passes.quantize_embedding import QuantizeEmbedding
from fxopt.passes.stats import collect
from fxopt.testing import PLAIN_CPU, assert_neutral, assert_refuses, candidates, rewritten
from tests.passes.helpers import torch_graph

ROWS, FEATURES = 50, 24


def table(*shape: int, dtype: Any = np.float32) -> Any:
    """Normal values, rows of very different size."""
    generator = np.random.default_rng(len(shape))
    values = generator.normal(size=shape or (ROWS, FEATURES))
    return (values * 10.0 ** generator.uniform(-3, 3, (len(values), 1))).astype(dtype)


def lookup_model(
    nodes: list[Any] | None = None, weights: dict[str, Any] | None = None, kind: int = TensorProto.FLOAT, rank: int = 3
) -> onnx.ModelProto:
    """Token numbers x [n, 5] -> y; by default one Gather."""
    nodes = nodes or [helper.make_node("Gather", ["table", "x"], ["y"], "embedding")]
    body = helper.make_graph(
        nodes, "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 5])],
        [helper.make_tensor_value_info("y", kind, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {"table": table()}).items()],
    )  # fmt: skip
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tokens(seed: int, rows: int = ROWS) -> torch.Tensor:
    """Indices from both ends."""
    return torch.randint(-rows, rows, (3, 5), generator=torch.Generator().manual_seed(seed))


def graph_of(model: onnx.ModelProto) -> Graph:
    graph = load(model)
    infer(graph, {"n": 3})
    return graph


SAMPLES = [[tokens(seed)] for seed in range(4)]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_are_rounded_as_numpy_rounds_them(kind: Any) -> None:
    values = table(dtype=kind) if kind == np.float32 else table().clip(-1e4, 1e4).astype(kind)
    element = TensorProto.FLOAT if kind == np.float32 else TensorProto.FLOAT16
    graph = graph_of(lookup_model(weights={"table": values}, kind=element))
    after = rewritten(QuantizeEmbedding(), graph, SAMPLES)
    after.prune()
    assert str(next(iter(after.calls())).target) == "fxopt.embedding_w8.default"
    (x,) = SAMPLES[0]
    found = after.run([x])[0]
    wide = values.astype(np.float64)[x.numpy()]
    steps = np.abs(wide).max(-1, keepdims=True) / 127
    expected = np.round(wide / steps).clip(-127, 127) * steps
    # a half may be rounded to the other side, and float16 has 11 bits
    assert np.mean(np.abs(found.double().numpy() - expected) > 1e-3 * np.abs(wide).max(-1, keepdims=True)) < 0.01
    assert (np.abs(found.double().numpy() - wide) <= 0.52 * steps + 1e-3 * np.abs(wide)).all()
    assert found.dtype == graph.run([x])[0].dtype
    executable = OnnxRuntime().compile(after, PLAIN_CPU, threads=1)
    assert torch.equal(executable.run([x])[0], found)
    executable.close()


@pytest.mark.parametrize("arguments", list(embedding_w8.sample_arguments()), ids=lambda item: str(item[2].shape))
def test_the_form_gives_what_the_definition_gives(arguments: tuple[torch.Tensor, ...]) -> None:
    """In ONNX Runtime, for indices of every rank, none among them."""
    codes, scales, indices = arguments
    graph = graph_of(lookup_model())
    gather = graph.find("embedding")
    assert gather is not None
    operands = graph.add_constant(codes, "codes"), graph.add_constant(scales, "scales"), gather.args[1]
    made = graph.call(embedding_w8.target, operands, before=gather, made_by="test")
    graph.replace(gather, made)
    model = to_model(graph, FORMS)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    session = onnxruntime_session(model)
    found = torch.from_numpy(np.asarray(session.run(None, {"x": indices.numpy()})[0]))
    expected = embedding_w8(codes, scales, indices)
    assert found.shape == expected.shape == (*indices.shape, codes.shape[1]) and torch.equal(found, expected)
    wide = codes.double()[indices] * scales.double()[indices]
    assert torch.allclose(expected.double(), wide, rtol=1e-6, atol=0)


def onnxruntime_session(model: onnx.ModelProto) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_fake_rule_and_cost() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for arguments in all_ops()["embedding_w8"].sample_arguments():
        with FakeTensorMode() as mode:
            shaped = embedding_w8(*(mode.from_tensor(value) for value in arguments))
        result = embedding_w8(*arguments)
        assert (shaped.shape, shaped.dtype) == (result.shape, result.dtype)
    codes, scales = torch.empty(1000, 64, dtype=torch.int8), torch.empty(1000, 1)
    cost = embedding_w8.cost_of(codes, scales, torch.empty(2, 5, dtype=torch.int64))
    assert cost.bytes == 10 * 64 * 5 + 10 * 12  # of the rows, not of the table
    assert cost.flops == 2 * 10 * 64 and cost.launches == 4


def test_the_estimate_is_what_happens() -> None:
    step = QuantizeEmbedding()
    graph = graph_of(lookup_model())
    (candidate,) = candidates(step, graph)
    infer(graph, {"n": 3})
    stats = collect(graph, SAMPLES, step.observed(graph, candidate))
    estimate = step.estimate(graph, candidate, stats)
    after = rewritten(step, graph, SAMPLES)
    after.prune()
    assert estimate.saved_bytes == graph.size_bytes() - after.size_bytes() == ROWS * (FEATURES * 3 - 4)
    before, result = (torch.cat([run.run(sample)[0] for sample in SAMPLES]).double() for run in (graph, after))
    noise = (result - before).square().sum() / (before - before.mean()).square().sum()
    assert 0 < noise < 1e-4 and noise / 4 < estimate.error < noise * 4
    assert (estimate.before, estimate.after) == step.work(graph, candidate)
    target = get_target("x86-avx512-vnni")
    times = [predict(cost, target).seconds for cost in (estimate.before, estimate.after)]
    assert times[0] < times[1]  # four launches instead of one: for few rows it is about the bytes


def test_size_is_what_chooses_it(tmp_path: Path) -> None:
    model = lookup_model(
        [
            helper.make_node("Gather", ["table", "x"], ["e"], "embedding"),
            helper.make_node("MatMul", ["e", "w"], ["y"], "fc"),
        ],
        {"table": table(5000, 64), "w": table(64, 32)},
    )
    batches = [{"x": tokens(seed, 5000)} for seed in range(4)]
    fast = fxopt.optimize(model, calibration=batches, threads=1, guard_seconds=0.5)
    (row,) = fast.ledger.select(node="^embedding$")
    assert row.outcome == "refused" and "does not pay: predicted" in row.reason
    small = fxopt.optimize(model, calibration=batches, threads=1, objective="size", guard_seconds=0.5)
    (row,) = [row for row in small.ledger.select(node="^embedding$") if row.outcome == "applied"]
    assert row.pass_name == "quantize-embedding"
    path = tmp_path / "small.onnx"
    small.save(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    make_session(path, 1, tmp_path / "run.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert kinds["Gather"] == 2 and kinds["DequantizeLinear"] == 0  # the table is never converted as a whole
    codes = [value for value in onnx.load(path).graph.initializer if list(value.dims) == [5000, 64]]
    assert [value.data_type for value in codes] == [TensorProto.INT8]
    assert small.report.error is not None and small.report.error.noise_to_signal < 0.02


def test_lookups_that_share_a_table_share_its_codes() -> None:
    model = lookup_model(
        [
            helper.make_node("Gather", ["table", "x"], ["a"], "encoder"),
            helper.make_node("Gather", ["table", "x"], ["b"], "decoder", axis=0),
            helper.make_node("Neg", ["b"], ["c"], "neg"),
            helper.make_node("Mul", ["a", "c"], ["y"], "mul"),
        ]
    )
    graph = graph_of(model)
    offered = candidates(QuantizeEmbedding(), graph)
    assert [str(found.refusal or "") for found in offered] == [
        "",
        "shares its table with encoder, where both are decided",
    ]
    after = rewritten(QuantizeEmbedding(), graph, SAMPLES)
    after.prune()
    assert [str(node.target) for node in after.calls()].count("fxopt.embedding_w8.default") == 2
    assert after.size_bytes() == ROWS * (FEATURES + 4)


def test_of_a_torch_graph() -> None:
    graph = torch_graph(
        lambda x, weight: torch.nn.functional.embedding(x, weight).relu(), tokens(0).abs() % ROWS,
        weight=torch.from_numpy(table()),
    )  # fmt: skip
    x = tokens(1) % ROWS
    after = rewritten(QuantizeEmbedding(), graph, [[x]])
    assert str(next(iter(after.calls())).target) == "fxopt.embedding_w8.default"
    apart = (after.run([x])[0] - graph.run([x])[0]).abs()
    assert (
        apart.max() > 0 and (apart <= 0.51 / 127 * graph.run([x])[0].abs().amax(-1, keepdim=True).clamp(min=1e6)).all()
    )


TIED = [
    helper.make_node("Gather", ["table", "x"], ["e"], "embedding"),
    helper.make_node("Transpose", ["table"], ["t"], "turned", perm=[1, 0]),
    helper.make_node("MatMul", ["e", "t"], ["y"], "head"),
]
INFINITE = table()
INFINITE[3, 2] = np.inf


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lookup_model(TIED), "the table is also taken by turned, which needs it in floats"),
        (lookup_model(weights={"table": INFINITE}), "infinite or NaN"),
        (lookup_model(weights={"table": table(dtype=np.float64)}, kind=TensorProto.DOUBLE), "type torch.float64"),
        (lookup_model(weights={"table": table(0, 4)}), "the table is empty"),
    ],
)
def test_refuses_with_a_reason(model: onnx.ModelProto, reason: str) -> None:
    assert_refuses(QuantizeEmbedding(), graph_of(model), reason)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gather", ["table", "x"], ["y"], axis=1)],
        [helper.make_node("Gather", ["cube", "x"], ["y"])],
        [helper.make_node("Gather", ["numbers", "x"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=1)],
    ],
)
def test_other_lookups_are_not_embeddings(nodes: list[Any]) -> None:
    weights = {"table": table(), "cube": table(), "numbers": np.arange(ROWS * FEATURES).reshape(ROWS, FEATURES)}
    weights["cube"] = weights["cube"].reshape(ROWS, 4, 6)
    used = {name: value for name, value in weights.items() if any(name in node.input for node in nodes)}
    rank = 4 if "cube" in used else 3
    assert candidates(QuantizeEmbedding(), graph_of(lookup_model(nodes, used, rank=rank))) == []


def test_excluded_nodes_and_backends_without_it() -> None:
    import re

    class Without(OnnxRuntime):
        def supports(self, op: str, dtype: str, pattern: str = "") -> str:
            return f"no kernel for {op} in {dtype}"

    graph = graph_of(lookup_model())
    context = Context(PLAIN_CPU, exclude=re.compile("embed"))
    assert_refuses(QuantizeEmbedding(), graph, "excluded by --exclude embed", context)
    context = Context(PLAIN_CPU, capabilities=Without())
    assert_refuses(QuantizeEmbedding(), graph, "no kernel for embedding_w8 in int8", context)


def test_neutral_and_options() -> None:
    assert_neutral(QuantizeEmbedding(bits=None), graph_of(lookup_model()), SAMPLES)
    assert list(QuantizeEmbedding(bits=None).candidates(graph_of(lookup_model()), Context(PLAIN_CPU))) == []
    with pytest.raises(InvalidOption, match="bits=4; expected 8"):
        QuantizeEmbedding(bits=4)
    assert QuantizeEmbedding() in lossy_passes()


def test_indices_that_are_computed_from_shapes() -> None:
    """Positions have no tensor as their type while types are derived; the lookup has a price all the same."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (int64[b, s] ids) => (float[s, 16] y) <float[64, 16] table = {0}> {'
        " zero = Constant <value_int = 0> () one = Constant <value_int = 1> ()"
        " shape = Shape (ids) length = Gather (shape, one) positions = Range (zero, length, one)"
        " y = Gather (table, positions) }"
    )
    table = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32), "table")
    proto.graph.initializer[0].CopyFrom(table)
    samples = [{"ids": np.zeros((2, length), np.int64)} for length in (3, 5, 8, 9)]
    result = fxopt.optimize(proto, calibration=samples, passes=["quantize-embedding"], objective="size")
    assert [row.outcome for row in result.ledger.select(pass_name="quantize-embedding")] == ["applied"]
