"""A language model as ONNX Runtime's tools leave it: every form imports, runs in torch alone, agrees, and round-trips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer
from torch import fx

from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.ir.onnx.op import OnnxOp

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "byte-lm.onnx"
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 256, (2, 13)).astype(np.int64)


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Three windows of random bytes."""

    def __init__(self) -> None:
        windows = np.random.default_rng(1).integers(0, 256, (3, 1, 24))
        self.rows: Iterator[dict[str, np.ndarray]] = iter([{"tokens": row.astype(np.int64)} for row in windows])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def options(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4
    made.intra_op_num_threads = 1
    made.graph_optimization_level = level
    return made


def optimized(source: Path, target: Path) -> None:
    made = options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    made.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), made, providers=["CPUExecutionProvider"])


def static(source: Path, target: Path, form: quantization.QuantFormat) -> None:
    quantization.quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=form,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        reduce_range=True,
    )


def few_bits(source: Path, target: Path, bits: int, symmetric: bool) -> None:
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=32, is_symmetric=symmetric
    )
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def make(form: str, target: Path) -> None:
    """Write the model in this form."""
    plain = target.with_name("plain.onnx")
    if form == "optimized":
        return optimized(MODEL, target)
    if form == "dynamic":
        return quantization.quantize_dynamic(MODEL, target, reduce_range=True)
    if form == "dynamic, optimized":
        quantization.quantize_dynamic(MODEL, plain, reduce_range=True)
        return optimized(plain, target)
    if form == "static, QDQ":
        return static(MODEL, target, quantization.QuantFormat.QDQ)
    if form == "static, QOperator":
        return static(MODEL, target, quantization.QuantFormat.QOperator)
    if form == "static, QDQ, optimized":
        static(MODEL, plain, quantization.QuantFormat.QDQ)
        return optimized(plain, target)
    if form == "4 bits":
        return few_bits(MODEL, target, 4, True)
    if form == "4 bits, asymmetric, optimized":
        few_bits(MODEL, plain, 4, False)
        return optimized(plain, target)
    return few_bits(MODEL, target, 8, True)


STEPS = 1e-3  # noise of results whose rounding to 8 bits may fall the other way after a difference in the last bit

# form -> (operators that must be there, bound on the noise-to-signal ratio against ONNX Runtime without optimisation)
FORMS: dict[str, tuple[set[str], float]] = {
    "optimized": ({"com.microsoft::SkipLayerNormalization", "com.microsoft::BiasGelu"}, 1e-10),
    "dynamic": ({"::MatMulInteger", "::DynamicQuantizeLinear"}, STEPS),
    "dynamic, optimized": ({"com.microsoft::DynamicQuantizeMatMul"}, STEPS),
    "static, QDQ": ({"::QuantizeLinear"}, 1e-10),
    "static, QOperator": ({"com.microsoft::QLinearAdd"}, STEPS),
    "static, QDQ, optimized": ({"com.microsoft::QLinearAdd", "com.microsoft::QLinearSoftmax"}, STEPS),
    "4 bits": ({"com.microsoft::MatMulNBits"}, 1e-10),
    "4 bits, asymmetric, optimized": ({"com.microsoft::MatMulNBits"}, 1e-10),
    "8 bits": ({"com.microsoft::MatMulNBits"}, 1e-10),
}


def every_value(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All values of a run in ONNX Runtime, without optimisation."""
    open_ = onnx.ModelProto()
    open_.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del open_.graph.output[:]
    open_.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    made = options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    session = onnxruntime.InferenceSession(open_.SerializeToString(), made, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, {"tokens": TOKENS}), strict=True))


def assert_every_node(graph: Graph, values: dict[str, np.ndarray]) -> int:
    """Every node gives what it gives in ONNX Runtime on the same inputs: 8 bits within a step, floats within 1e-12."""
    tensors: dict[fx.Node, Any] = {}
    checked = 0
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            tensors[node] = torch.from_numpy(TOKENS)
        elif node.op == "get_attr":
            tensors[node] = getattr(graph.root, str(node.target))
        elif isinstance(node.target, OnnxOp):
            arguments, options_ = fx.node.map_arg((node.args, node.kwargs), tensors.__getitem__)
            results = node.target(*arguments, **options_)
            results = results if isinstance(results, tuple) else (results,)
            right = [torch.from_numpy(np.array(values[name])) if name else None for name in node.meta["onnx"].outputs]
            for mine, expected in zip(results, right):
                if expected is not None:
                    assert_equal(np.asarray(mine), expected.numpy(), node.format_node() or "")
                    checked += 1
            tensors[node] = right[0] if len(right) == 1 else right
        elif node.op == "call_function":
            tensors[node] = node.target(*fx.node.map_arg(node.args, tensors.__getitem__))  # type: ignore[operator]
    return checked


def assert_equal(mine: np.ndarray, right: np.ndarray, what: str) -> None:
    assert mine.shape == right.shape, what
    difference = mine.astype(np.float64) - right.astype(np.float64)
    if right.dtype.kind in "iub":
        assert np.abs(difference).max(initial=0) <= (1 if right.dtype.itemsize == 1 else 0), what
    else:
        assert np.square(difference).sum() <= 1e-12 * np.square(right.astype(np.float64)).sum(), what


QUICK = {"optimized", "dynamic", "static, QDQ, optimized", "4 bits, asymmetric, optimized"}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in QUICK else pytest.mark.slow) for form in FORMS]
)
def test_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    make(form, path)
    wanted, bound = FORMS[form]
    graph = load(path)
    model = onnx.load(path)
    assert to_model(graph) == model
    operators = Counter(f"{node.domain}::{node.op_type}" for node in model.graph.node)
    assert wanted <= set(operators), operators
    values = every_value(model)
    assert assert_every_node(graph, values) >= 100
    right = values[model.graph.output[0].name]
    (mine,) = graph.run([torch.from_numpy(TOKENS)])  # without an evaluator: every operator has its reference
    assert mine.numpy().shape == right.shape
    noise = np.square(mine.double().numpy() - right).sum() / np.square(right.astype(np.float64)).sum()
    assert noise <= bound, f"{form}: {noise:.1e}"
