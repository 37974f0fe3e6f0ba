"""SparseLinearInt8 in ONNX Runtime against its definition: every form, rows and panels, one node and two in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.backends.tvm import Tvm
from fxopt.cost_model.targets import get_target
from fxopt.errors import MissingDependency
from fxopt.ir.onnx.references.own import PANEL, as_panels, as_rows, sparse_linear_int8
from fxopt.ir.onnx.registry import Call
from fxopt.ir.ops.linear_u8s8 import linear_u8s8, quantize_u8
from fxopt.ir.ops.sparse_linear_u8s8 import BLOCK, block_density, sparse_linear_u8s8

try:
    Tvm.require()
except MissingDependency as error:
    pytest.skip(str(error), allow_module_level=True)
if "avx2" not in get_target("host").features:
    pytest.skip("this computer has no AVX2", allow_module_level=True)

from fxopt.backends.tvm.custom_ops import DOMAIN, SPARSE, attributes, build_custom_ops  # isort: skip
from fxopt.backends.tvm.kernels.sparse_int8 import SparseForm  # isort: skip

SMALL, LARGE, X_ZERO, Y_ZERO, EPS = 24, 51, 117, 40, 1e-5
FORMS = {
    "floats": SparseForm(SMALL, LARGE, "gelu"),
    "bytes": SparseForm(SMALL, LARGE, "gelu", False, True),
    "both": SparseForm(SMALL, LARGE, "none", True, True),
    "relu": SparseForm(SMALL, LARGE, "relu", False, True),
    "tanh": SparseForm(SMALL, LARGE, "gelu_tanh", True, True),
    "sum": SparseForm(SMALL, LARGE, "residual", True, True),
    "sum_bytes": SparseForm(SMALL, LARGE, "residual", False, True),
    "norm": SparseForm(SMALL, LARGE, "layer_norm", True, False, EPS),
    "norm_bytes": SparseForm(SMALL, LARGE, "layer_norm", True, True, EPS),
    "back": SparseForm(LARGE, SMALL),
}
SHAPES = ((1,), (0,), (2, 3), (64,), (130,), (3, 2, 67))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_custom_ops(FORMS.values(), tmp_path_factory.mktemp("ops") / "ops.so")


def operands(form: SparseForm) -> dict[str, Any]:
    random = np.random.default_rng(form.inner)
    codes = random.integers(-127, 128, (form.outputs, form.inner)).astype(np.int8)
    kept = random.random((-(-form.outputs // BLOCK), form.inner)) < 0.3
    kept[1] = False  # a row of blocks without any
    return {
        "weight": codes * np.repeat(kept, BLOCK, 0)[: form.outputs],
        "scales": random.uniform(1e-5, 2e-4, form.outputs).astype(np.float32),
        "bias": random.standard_normal(form.outputs).astype(np.float32),
        "inverse": random.uniform(10, 40, form.outputs).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, form.outputs).astype(np.float32),
        "beta": random.standard_normal(form.outputs).astype(np.float32),
    }


def node(form: SparseForm, x: str, y: str, codes: str, tag: str, **changed: Any) -> tuple[Any, list[Any]]:
    """The form's node and its initializers."""
    added = form.epilogue in ("residual", "layer_norm")
    kept = ["weight", "scales", "bias", *(["inverse"] if form.codes else [])]
    names = [x, *(f"{name}{tag}" for name in kept)]
    if added:
        names += [*([] if form.codes else [""]), "residual"]
    if form.epilogue == "layer_norm":
        kept += ["gamma", "beta"]
        names += [f"gamma{tag}", f"beta{tag}"]
    outputs = [y if form.floats else "", *([codes] if form.codes else [])]
    options = {**attributes(form, X_ZERO, Y_ZERO), **changed}
    held = operands(form)
    made = helper.make_node(SPARSE, names, outputs, domain=DOMAIN, **options)
    return made, [numpy_helper.from_array(held[name], f"{name}{tag}") for name in kept]


def session(library: Path, nodes: list[Any], initializers: list[Any], outputs: dict[str, int], added: bool) -> Any:
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.UINT8, None)]
    inputs += [value("residual", TensorProto.FLOAT, None)] if added else []
    results = [value(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "g", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def opened(threads: int) -> ort.InferenceSession:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 4
        settings.register_custom_ops_library(str(library))
        return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    return opened


def single(library: Path, form: SparseForm, **changed: Any) -> Any:
    made, initializers = node(form, "x", "y", "codes", "", **changed)
    outputs = {"y": TensorProto.FLOAT} if form.floats else {}
    outputs |= {"codes": TensorProto.UINT8} if form.codes else {}
    return session(library, [made], initializers, outputs, form.epilogue in ("residual", "layer_norm"))


def defined(form: SparseForm, x: torch.Tensor, residual: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """y and its codes, in rows."""
    held = {name: torch.from_numpy(value) for name, value in operands(form).items()}
    added = residual if form.epilogue in ("residual", "layer_norm") else None
    given = (x, held["weight"], held["scales"], held["bias"], X_ZERO, form.epilogue)
    y = linear_u8s8.function(*given, added, held["gamma"], held["beta"], EPS)
    return y, quantize_u8.function(y, held["inverse"], Y_ZERO)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Floats to rounding of float32, bytes to one level (of values that lie at a tie)."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.dtype != torch.uint8:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    elif found.numel():
        distance = (found.int() - expected.int()).abs()
        assert distance.max() <= 1 and distance.float().mean() < 0.02


@pytest.mark.parametrize("shape", [(3,), (64,), (2, 64), (130,), (0,), (3, 2, 67)])
@pytest.mark.parametrize("size", [1, 5, 24])
def test_panels(shape: tuple[int, ...], size: int) -> None:
    rows = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
    panels = as_panels(rows)
    assert panels.shape == rows.shape and torch.equal(as_rows(panels), rows)
    flat, turned = rows.reshape(-1, size), panels.reshape(-1)
    whole = len(flat) // PANEL * PANEL
    for start in range(0, whole, PANEL):
        panel = turned[start * size : (start + PANEL) * size].reshape(size, PANEL)
        assert torch.equal(panel, flat[start : start + PANEL].t())
    assert torch.equal(turned[whole * size :], flat[whole:].reshape(-1))


def test_density() -> None:
    codes = torch.zeros(6, 3, dtype=torch.int8)
    assert block_density(codes) == 0 and block_density(codes[:0]) == 0
    codes[1, 0] = codes[2, 0] = codes[5, 2] = 1
    assert block_density(codes) == 2 / 6
    for arguments in sparse_linear_u8s8.sample_arguments():
        assert arguments[-1] == block_density(arguments[1])
        cost = sparse_linear_u8s8.cost_of(*arguments)
        dense = linear_u8s8.cost_of(*arguments[:-1])
        assert cost.multiply_adds == pytest.approx(arguments[-1] * dense.multiply_adds) and cost.bytes == dense.bytes


def test_reference_of_panels() -> None:
    form = FORMS["both"]
    held = {name: torch.from_numpy(value) for name, value in operands(form).items()}
    x = torch.randint(0, 256, (2, 50, SMALL), dtype=torch.uint8)
    y, codes = defined(form, x, None)
    given = (held["weight"], held["scales"], held["bias"], held["inverse"])
    options = {"x_zero": X_ZERO, "y_zero": Y_ZERO, "x_panels": 1, "codes_panels": 1}
    found = sparse_linear_int8(Call(version=1, outputs=2), as_panels(x), *given, **options)
    assert torch.equal(found[0], y) and torch.equal(as_rows(found[1]), codes)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("threads", [1, 2])
def test_custom_operator(library: Path, name: str, threads: int) -> None:
    form = FORMS[name]
    for x_panels, codes_panels in ((0, 0), (1, 0), (0, 1), (1, 1)) if form.codes else ((0, 0), (1, 0)):
        made = single(library, form, x_panels=x_panels, codes_panels=codes_panels)(threads)
        for shape in SHAPES:
            x = torch.randint(0, 256, (*shape, form.inner), dtype=torch.uint8)
            residual = torch.randn(*shape, form.outputs)
            feed = {"x": (as_panels(x) if x_panels else x).numpy()}
            if form.epilogue in ("residual", "layer_norm"):
                feed["residual"] = residual.numpy()
            found = [torch.from_numpy(value) for value in made.run(None, feed)]
            y, codes = defined(form, x, residual)
            if form.floats:
                close(found[0], y)
            if form.codes:
                close(as_rows(found[-1]) if codes_panels else found[-1], codes)


@pytest.mark.slow
@pytest.mark.parametrize("panels", [0, 1])
def test_two_in_a_row(library: Path, panels: int) -> None:
    """What the first one makes, the second one takes: in rows and as panels the same result to the last bit."""
    first, one = node(FORMS["bytes"], "x", "", "hidden", "_1", codes_panels=panels)
    second, two = node(FORMS["back"], "hidden", "y", "", "_2", x_panels=panels)
    made = session(library, [first, second], [*one, *two], {"y": TensorProto.FLOAT}, False)(1)
    plain_first, _ = node(FORMS["bytes"], "x", "", "hidden", "_1")
    plain_second, _ = node(FORMS["back"], "hidden", "y", "", "_2")
    plain = session(library, [plain_first, plain_second], [*one, *two], {"y": TensorProto.FLOAT}, False)(1)
    for shape in SHAPES:
        x = np.random.default_rng(1).integers(0, 256, (*shape, SMALL)).astype(np.uint8)
        assert np.array_equal(made.run(None, {"x": x})[0], plain.run(None, {"x": x})[0])


@pytest.mark.slow
def test_refusals(library: Path) -> None:
    with pytest.raises(Exception, match="no kernel for the linear's sizes"):
        single(library, FORMS["floats"], epilogue=0)(1)
    with pytest.raises(Exception, match="no kernel for the linear's sizes"):
        single(library, FORMS["norm"], eps=1e-3)(1)
    made = single(library, FORMS["floats"])(1)
    with pytest.raises(Exception, match="does not have the weight's sizes"):
        made.run(None, {"x": np.zeros((4, SMALL + 1), np.uint8)})
