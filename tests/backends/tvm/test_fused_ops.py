"""The operators' kernels against their definitions, in this process and as ONNX Runtime custom operators."""

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
from fxopt.errors import InvalidInput, MissingDependency
from fxopt.ir.ops.linear_u8s8 import layer_norm_u8, linear_u8s8, quantize_u8

try:
    Tvm.require()
except MissingDependency as error:
    pytest.skip(str(error), allow_module_level=True)
if "avx2" not in get_target("host").features:
    pytest.skip("this computer has no AVX2", allow_module_level=True)

from fxopt.backends.tvm import fused_cpu  # isort: skip
from fxopt.backends.tvm.custom_ops import (
    ATTENTION,
    DOMAIN,
    NORM_QUANTIZE,
    OPERATOR,
    QUANTIZE,
    attributes,
    build_custom_ops,
)  # isort: skip

from fxopt.backends.tvm.kernels.attention_int8 import AttentionForm  # isort: skip
from fxopt.backends.tvm.kernels.fused_int8 import Form  # isort: skip
from fxopt.backends.tvm.kernels.rows_u8 import RowForm  # isort: skip

pytestmark = pytest.mark.slow
FAMILY = [linear_u8s8, quantize_u8, layer_norm_u8]


def close(found: Any, expected: Any) -> None:
    """Floats to rounding of float32, bytes to one level (of values that lie at a tie)."""
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype == torch.uint8:
            distance = (a.int() - b.int()).abs()
            assert distance.numel() == 0 or (distance.max() <= 1 and distance.float().mean() < 0.02)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("operator", FAMILY, ids=lambda operator: operator.name)
def test_in_process(operator: Any) -> None:
    fused_cpu.register()
    for arguments in operator.sample_arguments():
        before = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        close(operator(*arguments), operator.function(*arguments))
        for value, kept in zip(arguments, before, strict=True):
            assert not isinstance(value, torch.Tensor) or torch.equal(value, kept)


def test_odd_layouts_and_no_rows() -> None:
    fused_cpu.register()
    for arguments in linear_u8s8.sample_arguments():
        q, residual = arguments[0], arguments[6]
        turned = q.transpose(0, -2).contiguous().transpose(0, -2)
        close(linear_u8s8(turned, *arguments[1:]), linear_u8s8.function(turned, *arguments[1:]))
        none = (q[:0], *arguments[1:6], None if residual is None else residual[:0], *arguments[7:])
        close(linear_u8s8(*none), linear_u8s8.function(*none))


def test_written_weights_are_packed_again() -> None:
    fused_cpu.register()
    q, codes, scales, bias, zero, *rest = next(linear_u8s8.sample_arguments())
    for step in (0, 1):
        codes.add_(step).clamp_(-127, 127)
        for other in (zero, 3):
            given = (q, codes, scales, bias, other, *rest)
            close(linear_u8s8(*given), linear_u8s8.function(*given))


def test_refusals() -> None:
    fused_cpu.register()
    q, codes, scales, bias, *rest = next(linear_u8s8.sample_arguments())
    with pytest.raises(InvalidInput, match="q is torch.float32"):
        linear_u8s8(q.float(), codes, scales, bias, *rest)
    with pytest.raises(InvalidInput, match=r"bias has shape \[7\]; expected \[8\]"):
        linear_u8s8(q, codes, scales, bias[:7], *rest)
    with pytest.raises(InvalidInput, match=r"inverse has shape \[1\]; expected \[8\]"):
        quantize_u8(torch.ones(3, 8), torch.ones(1), 0)


# ---- ONNX Runtime

INNER, OUT, X_ZERO, Y_ZERO, EPS = 24, 51, 117, 40, 1e-5
FORMS = {
    "floats": Form(INNER, OUT, "gelu"),
    "bytes": Form(INNER, OUT, "gelu", False, True),
    "both": Form(INNER, OUT, "none", True, True),
    "relu": Form(INNER, OUT, "relu", False, True),
    "tanh": Form(INNER, OUT, "gelu_tanh", True, True),
    "sum": Form(INNER, OUT, "residual", True, True),
    "norm": Form(INNER, OUT, "layer_norm", True, False, EPS),
    "norm_bytes": Form(INNER, OUT, "layer_norm", True, True, EPS),
}
ROW_FORMS = [RowForm(OUT), RowForm(OUT, EPS), RowForm(64)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_custom_ops(
        [*FORMS.values(), *ROW_FORMS, AttentionForm(32, 96)], tmp_path_factory.mktemp("ops") / "ops.so"
    )


def operands() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "weight": random.integers(-127, 128, (OUT, INNER)).astype(np.int8),
        "scales": random.uniform(1e-5, 2e-4, OUT).astype(np.float32),
        "bias": random.standard_normal(OUT).astype(np.float32),
        "inverse": random.uniform(10, 40, OUT).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, OUT).astype(np.float32),
        "beta": random.standard_normal(OUT).astype(np.float32),
    }


def session(library: Path, form: Form, threads: int = 1, **changed: Any) -> ort.InferenceSession:
    """A model of one node; `changed`: attributes, `constant_weight`."""
    held = operands()
    added = form.epilogue in ("residual", "layer_norm")
    names = ["x", "weight", "scales", "bias", "inverse" if form.codes else ""]
    names += ["residual"] if added else []
    names += ["gamma", "beta"] if form.epilogue == "layer_norm" else []
    outputs = ["y" if form.floats else "", "codes" if form.codes else ""]
    options = {**attributes(form, X_ZERO, Y_ZERO), **changed}
    is_constant = options.pop("constant_weight", True)
    node = helper.make_node(OPERATOR, names, outputs, domain=DOMAIN, **options)
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.UINT8, None)]
    inputs += [value("residual", TensorProto.FLOAT, None)] if added else []
    inputs += [] if is_constant else [value("weight", TensorProto.INT8, [OUT, INNER])]
    results = [value("y", TensorProto.FLOAT, None)] if form.floats else []
    results += [value("codes", TensorProto.UINT8, None)] if form.codes else []
    used = [name for name in names if name in held and (is_constant or name != "weight")]
    initializers = [numpy_helper.from_array(held[name], name) for name in used]
    graph = helper.make_graph([node], "g", inputs, results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)])
    return loaded(model, library, threads)


def loaded(model: Any, library: Path, threads: int) -> ort.InferenceSession:
    model.ir_version = 10
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    settings.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def definition(form: Form, x: Any, residual: Any) -> tuple[Any, ...]:
    held = {name: torch.from_numpy(value) for name, value in operands().items()}
    given = (torch.from_numpy(x), held["weight"], held["scales"], held["bias"], X_ZERO, form.epilogue)
    added = torch.from_numpy(residual) if form.epilogue in ("residual", "layer_norm") else None
    y = linear_u8s8.function(*given, added, held["gamma"], held["beta"], EPS)
    codes = quantize_u8.function(y, held["inverse"], Y_ZERO)
    return (*((y,) if form.floats else ()), *((codes,) if form.codes else ()))


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("threads", [1, 2])
def test_custom_operator(library: Path, name: str, threads: int) -> None:
    form = FORMS[name]
    made = session(library, form, threads)
    for shape in ((1,), (0,), (2, 3), (130,), (3, 2, 67)):
        x = np.random.default_rng(1).integers(0, 256, (*shape, INNER)).astype(np.uint8)
        residual = np.random.default_rng(2).standard_normal((*shape, OUT)).astype(np.float32)
        feed = {"x": x, "residual": residual} if form.epilogue in ("residual", "layer_norm") else {"x": x}
        found = tuple(torch.from_numpy(value) for value in made.run(None, feed))
        close(found, definition(form, x, residual))


def row_session(library: Path, size: int, eps: float | None, threads: int = 1) -> ort.InferenceSession:
    held = operands()
    names = ["inverse"] if eps is None else ["inverse", "gamma", "beta"]
    options = {"zero": Y_ZERO} if eps is None else {"zero": Y_ZERO, "eps": eps}
    op = QUANTIZE if eps is None else NORM_QUANTIZE
    node = helper.make_node(op, ["x", *names], ["codes"], domain=DOMAIN, **options)
    value = helper.make_tensor_value_info
    initializers = [numpy_helper.from_array(np.resize(held[name], size), name) for name in names]
    inputs, results = [value("x", TensorProto.FLOAT, None)], [value("codes", TensorProto.UINT8, None)]
    graph = helper.make_graph([node], "g", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return loaded(helper.make_model(graph, opset_imports=opsets), library, threads)


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows(library: Path, eps: float | None, threads: int) -> None:
    made = row_session(library, OUT, eps, threads)
    held = {name: torch.from_numpy(value) for name, value in operands().items()}
    for shape in ((OUT,), (0, OUT), (1, OUT), (3, 2, 67, OUT)):
        x = 4 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        if eps is None:
            expected = quantize_u8.function(torch.from_numpy(x), held["inverse"], Y_ZERO)
        else:
            norm = (held["gamma"], held["beta"], eps, held["inverse"], Y_ZERO)
            expected = layer_norm_u8.function(torch.from_numpy(x), *norm)
        close(torch.from_numpy(made.run(None, {"x": x})[0]), expected)


def test_rows_refuse(library: Path) -> None:
    with pytest.raises(Exception, match="no kernel for rows of this size"):
        row_session(library, 32, None).run(None, {"x": np.zeros((2, 32), np.float32)})
    with pytest.raises(Exception, match="no kernel for rows of this size"):
        row_session(library, OUT, 1e-3).run(None, {"x": np.zeros((2, OUT), np.float32)})
    with pytest.raises(Exception, match="one value per channel"):
        row_session(library, OUT, None).run(None, {"x": np.zeros((2, 64), np.float32)})


def attention_session(library: Path, masked: bool, threads: int = 1, heads: int = 3) -> ort.InferenceSession:
    inverse = numpy_helper.from_array(np.linspace(0.5, 1.5, 96, dtype=np.float32), "inverse")
    names = ["q", "k", "v", "inverse", *(["mask"] if masked else [])]
    node = helper.make_node(ATTENTION, names, ["codes"], domain=DOMAIN, num_heads=heads, factor=2e-4, zero=Y_ZERO)
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.UINT8, None) for name in "qkv"]
    inputs += [value("mask", TensorProto.FLOAT, None)] if masked else []
    graph = helper.make_graph([node], "g", inputs, [value("codes", TensorProto.UINT8, None)], [inverse])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return loaded(helper.make_model(graph, opset_imports=opsets), library, threads)


def attended(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """In float64, with probabilities that are codes."""
    heads = [(x.astype(np.float64) - 128).reshape(*x.shape[:2], 3, 32).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(0, 1, 3, 2) * np.float64(np.float32(2e-4)) + mask
    codes = np.rint(255 * np.exp(scores - scores.max(-1, keepdims=True)))
    y = (codes / codes.sum(-1, keepdims=True)) @ heads[2]
    return y.transpose(0, 2, 1, 3).reshape(q.shape) * np.linspace(0.5, 1.5, 96) + Y_ZERO


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("masked", ["", "keys", "queries", "shared"])
def test_attention(library: Path, masked: str, threads: int) -> None:
    made = attention_session(library, bool(masked), threads)
    random = np.random.default_rng(0)
    for batch, queries, keys in ((1, 1, 1), (2, 5, 3), (0, 4, 4), (1, 0, 4), (2, 13, 33), (1, 64, 70)):
        q, k, v = (random.integers(0, 256, (batch, n, 96)).astype(np.uint8) for n in (queries, keys, keys))
        shape = (batch if masked == "keys" else 1, 1, 1 if masked == "keys" else queries, keys)
        mask = np.where(random.random(shape) < 0.3, -1e30, random.standard_normal(shape)).astype(np.float32)
        mask[..., :1] = 0
        if masked == "queries":
            mask = np.repeat(mask, batch, 0)
        feed = {"q": q, "k": k, "v": v, **({"mask": mask} if masked else {})}
        mask = mask if masked else 0 * mask
        found = made.run(None, feed)[0]
        assert found.shape == q.shape
        if q.size:  # a probability near a tie may get the next code: one value of v in some hundreds
            levels = attended(q, k, v, mask.astype(np.float64))
            assert np.abs(found - np.clip(levels, 0, 255)).max() < 1.5


def test_attention_refuses(library: Path) -> None:
    q, k = np.zeros((1, 4, 96), np.uint8), np.zeros((1, 6, 96), np.uint8)
    made = attention_session(library, True)
    with pytest.raises(Exception, match="sizes of q, k, v and inverse do not agree"):
        made.run(None, {"q": q, "k": k, "v": q, "mask": np.zeros((1, 1, 1, 6), np.float32)})
    with pytest.raises(Exception, match="mask is not"):
        made.run(None, {"q": q, "k": k, "v": k, "mask": np.zeros((1, 3, 1, 6), np.float32)})
    with pytest.raises(Exception, match="there are no keys"):
        made.run(None, {"q": q, "k": k[:, :0], "v": k[:, :0], "mask": np.zeros((1, 1, 1, 0), np.float32)})
    with pytest.raises(Exception, match="no kernel for these heads"):
        attention_session(library, False, heads=2).run(None, {"q": q, "k": k, "v": k})
    with pytest.raises(Exception, match="num_heads is not positive"):
        attention_session(library, False, heads=0)


def test_custom_operator_refuses(library: Path) -> None:
    with pytest.raises(Exception, match="no kernel for the linear's sizes"):
        session(library, FORMS["floats"], epilogue=0)
    with pytest.raises(Exception, match="no kernel for the linear's sizes"):
        session(library, FORMS["norm"], eps=1e-3)
    with pytest.raises(Exception, match="weight must be an initializer"):
        session(library, FORMS["floats"], constant_weight=False)
    made = session(library, FORMS["norm"])
    x, residual = np.zeros((4, INNER), np.uint8), np.zeros((4, OUT), np.float32)
    with pytest.raises(Exception, match="does not have the weight's sizes"):
        made.run(None, {"x": x[:, 1:], "residual": residual})
    with pytest.raises(Exception, match="does not have the weight's sizes"):
        made.run(None, {"x": x, "residual": residual[1:]})


def test_library_needs_the_c_library_only(library: Path) -> None:
    data = library.read_bytes()
    assert b"\0malloc\0" in data and b"\0RegisterCustomOps\0" in data
    assert b"TVM" not in data and b"expf" not in data and b"erff" not in data
