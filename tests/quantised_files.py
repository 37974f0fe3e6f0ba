"""Small models quantised by ONNX Runtime's own tools: what users bring."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = {"c1": (8, 3, 3, 3), "c2": (8, 8, 3, 3), "gw": (32, 8), "mw": (32, 48), "hw": (48, 10)}
STATIC = [
    f"{form}-{per}-{kind}" for form in ("QDQ", "QOperator") for per in ("tensor", "channel") for kind in ("s", "u")
]
DYNAMIC = ["dynamic-s", "dynamic-u"]
FEW_BITS = ["nbits-QOperator-symmetric", "nbits-QOperator-asymmetric", "nbits-QDQ-symmetric", "nbits-QDQ-asymmetric"]
ALL = [*STATIC, *DYNAMIC, *FEW_BITS]


@cache
def float_model() -> onnx.ModelProto:
    """Two convolutions with a residual, average pooling, Gemm, MatMul with bias, MatMul without; x float[n, 3, 8, 8]."""
    generator = np.random.default_rng(0)

    def normal(*shape: int, fan: int = 1) -> Any:
        return (generator.normal(size=shape) / np.sqrt(fan)).astype(np.float32)

    arrays = {
        "c1": normal(8, 3, 3, 3, fan=27), "c2": normal(8, 8, 3, 3, fan=72), "gw": normal(32, 8, fan=8),
        "mw": normal(32, 48, fan=32), "hw": normal(48, 10, fan=48),
        "b1": normal(8), "b2": normal(8), "gb": normal(32), "mb": normal(48),
    }  # fmt: skip
    body = onnx.parser.parse_graph(
        """net (float[n, 3, 8, 8] x) => (float[n, 10] y) {
            c = Conv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(x, c1, b1)
            r = Relu(c)
            d = Conv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(r, c2, b2)
            s = Add(d, r)
            p = GlobalAveragePool(s)
            f = Flatten(p)
            g = Gemm<transB=1>(f, gw, gb)
            h = Relu(g)
            m = MatMul(h, mw)
            a = Add(m, mb)
            t = Tanh(a)
            y = MatMul(t, hw)
        }"""
    )
    names = ["conv", "relu", "conv2", "sum", "pool", "flat", "gemm", "relu2", "linear", "bias", "tanh", "head"]
    for node, name in zip(body.node, names, strict=True):
        node.name = name
    body.initializer.extend(numpy_helper.from_array(value, name) for name, value in arrays.items())
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def samples(count: int = 2, rows: int = 2, seed: int = 1) -> list[Any]:
    """Arrays for x."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(rows, 3, 8, 8)).astype(np.float32) for _ in range(count)]


@cache
def quantised(kind: str) -> onnx.ModelProto:
    """The model of `float_model`, quantised as one of `ALL` says."""
    logging.disable(logging.WARNING)  # the quantisers tell every step
    with TemporaryDirectory() as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(float_model(), source)
        try:
            if kind in FEW_BITS:
                return _few_bits(kind)
            _eight_bits(kind, source, result)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(result)


def _eight_bits(kind: str, source: Path, result: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )  # fmt: skip

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Any] = iter([{"x": sample} for sample in samples(8, seed=2)])

        def get_next(self) -> Any:
            return next(self.rest, None)

    weights = QuantType.QInt8 if kind.endswith("s") else QuantType.QUInt8
    if kind in DYNAMIC:
        quantize_dynamic(source, result, weight_type=weights)
        return
    form, per, _ = kind.split("-")
    quantize_static(
        source, result, Reader(), quant_format=QuantFormat[form], per_channel=per == "channel",
        activation_type=QuantType.QUInt8, weight_type=weights,
    )  # fmt: skip


def _few_bits(kind: str) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat

    _, form, grid = kind.split("-")
    copied = onnx.ModelProto.FromString(float_model().SerializeToString())
    quantizer = MatMulNBitsQuantizer(
        copied, block_size=32, is_symmetric=grid == "symmetric", quant_format=QuantFormat[form]
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


def arrays(model: onnx.ModelProto) -> dict[str, Any]:
    """The initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def with_weights(values: dict[str, Any]) -> onnx.ModelProto:
    """The float model with other constants."""
    model = onnx.ModelProto.FromString(float_model().SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = np.asarray(values[tensor.name], dtype=np.float32).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert all(tensor.data_type == TensorProto.FLOAT for tensor in model.graph.initializer)
    return model


def stood_for(kind: str) -> dict[str, Any]:
    """What the codes of every weight stand for, by the weight's name: scale * (code - zero point) in float32."""
    found = arrays(quantised(kind))
    return {name: _value(kind, found, name) for name in WEIGHTS if kind not in FEW_BITS or name in ("mw", "hw")}


def _value(kind: str, found: dict[str, Any], name: str) -> Any:
    if kind in FEW_BITS:
        return _blocks(kind, found, name)
    stem = f"{name}_Transposed" if f"{name}_Transposed_quantized" in found else name
    codes, scale, zero = (found[f"{stem}_{part}"] for part in ("quantized", "scale", "zero_point"))
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[1 if name in ("mw", "hw") else 0] = -1
    value = (codes.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    return value.T if stem != name else value


def _blocks(kind: str, found: dict[str, Any], name: str) -> Any:
    """Blocks of 32 along the inputs; packed codes have the low half of a byte first, and 8 as zero by default."""
    inputs, outputs = WEIGHTS[name]
    blocks = -(-inputs // 32)
    if "QDQ" in kind:
        codes, scale = found[f"{name}_DQ_Q4"].astype(np.float32), found[f"{name}_DQ_scales"]
        zero = found.get(f"{name}_DQ_zero_points", np.zeros_like(scale)).astype(np.float32)
        return (codes - zero.repeat(32, 0)[:inputs]) * scale.repeat(32, 0)[:inputs]
    parts = {key: value for key, value in found.items() if key.startswith(f"{name}_")}
    packed = next(value for value in parts.values() if value.ndim == 3)
    scale = next(value for value in parts.values() if value.dtype == np.float32).reshape(outputs, blocks)
    zeros = [value for value in parts.values() if value.dtype == np.uint8 and value.ndim < 3]
    zero = np.full((outputs, blocks), 8.0, np.float32)
    if "asymmetric" in kind:
        zero = _nibbles(zeros[0].reshape(outputs, -1))[:, :blocks]
    codes = _nibbles(packed.reshape(outputs, -1))[:, :inputs]
    return ((codes - zero.repeat(32, 1)[:, :inputs]) * scale.repeat(32, 1)[:, :inputs]).T


def _nibbles(packed: Any) -> Any:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)
