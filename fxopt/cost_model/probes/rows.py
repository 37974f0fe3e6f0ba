"""The probes: operators over several shapes, every second one held out of a fit, and whole models, all held out.

The kinds and counts of `fxopt.cost_model.work` were chosen with all probes in view; what is fitted are the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from fxopt.cost_model.probes.build import FLOAT, INT8, UINT8, Build

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One model to measure; its inputs have fixed shapes."""

    name: str
    group: str
    held_out: bool
    model: ModelProto


_LINEARS = [(384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072)]
_TINY = [(16, 64, 10), (1, 64, 32), (64, 64, 64), (8, 128, 128), (16, 512, 64), (128, 1024, 64)]
_CONVS = [  # out, in / groups, kernel, size, stride, groups
    *((32, 3, 3, 112, 2, 1), (16, 1, 3, 28, 1, 1), (96, 1, 3, 56, 1, 96), (240, 1, 5, 14, 1, 240)),
    *((64, 64, 3, 56, 1, 1), (256, 64, 1, 56, 1, 1), (64, 256, 1, 56, 1, 1), (128, 128, 3, 28, 1, 1)),
    *((256, 256, 3, 14, 1, 1), (512, 128, 1, 28, 1, 1), (32, 16, 3, 14, 1, 1), (512, 512, 3, 7, 1, 1)),
]
_ACTIVATIONS = [(128, 384), (128, 1536), (512, 768), (16, 384), (64, 3072), (12, 128, 128)]
_SEQUENCES = [(128, 384), (128, 768), (64, 384), (256, 768)]  # length, width
_SKIPS = [(1, 128, 384), (1, 512, 768), (1, 128, 768), (1, 64, 1024)]
_HEADS = [  # shape, order
    *(((1, 128, 12, 32), (0, 2, 1, 3)), ((1, 512, 12, 64), (0, 2, 1, 3))),
    *(((1, 512, 12, 64), (0, 2, 3, 1)), ((1, 128, 12, 64), (0, 2, 3, 1))),
]
_QUANTIZE = ("DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear")


def probes() -> Iterator[Probe]:
    """All probes; deterministic."""
    for group, models in _groups().items():
        for index, (name, model) in enumerate(models):
            yield Probe(f"{group}: {name}", group, index % 2 == 1 and group != "launch", model)
    for name, model in _models():
        yield Probe(f"model: {name}", "model", True, model)


def _groups() -> dict[str, list[tuple[str, ModelProto]]]:
    shapes = [(m, k, n) for m in (4, 16, 128, 512) for k, n in _LINEARS] + _TINY
    vectors = [(1, k, n) for k, n in _LINEARS[1:]]
    return {
        "launch": [(op, _layers(op, (1, 16), 64)) for op in ("Add", "Softmax", "LayerNormalization", "MatMul")],
        "gemv": [
            (f"{name} {_text(shape)}", _linear(shape, layer))
            for name, layer in (("float32", Build.linear), ("int8", Build.linear_int8))
            for shape in vectors
        ],
        "linear float32": [(_text(shape), _linear(shape, Build.linear)) for shape in shapes],
        "linear int8": [(_text(shape), _linear(shape, Build.linear_int8)) for shape in shapes],
        "linear uint8": [(_text(shape), _signs(shape, UINT8, np.uint8)) for shape in shapes[5:15:2]],
        "linear s8s8": [(_text(shape), _signs(shape, INT8, np.int8)) for shape in shapes[5:15:2]],
        "conv float32": [(_text(shape), _conv(shape, FLOAT)) for shape in _CONVS],
        "conv int8": [(_text(shape), _conv(shape, UINT8)) for shape in _CONVS],
        "attention": [(f"{how} {s}x{d}", _attention(how, s, d)) for how in ("fused", "parts") for s, d in _SEQUENCES],
        "norm": _over(("LayerNormalization", "Softmax"), _ACTIVATIONS, 4),
        "norm.skip": [(_text(shape), _skip(shape)) for shape in _SKIPS],
        "elementwise": _over(("Gelu", "Erf", "Relu", "Tanh", "Sigmoid", "Exp"), _ACTIVATIONS[:3], 1),
        "quantize": [(f"{op} {_text(shape)}", _quantize(op, shape)) for op in _QUANTIZE for shape in _ACTIVATIONS[:3]],
        "pool": [
            ("MaxPool 2/2 64x56x56", _max_pool(2, 2, 64, 56)),
            ("MaxPool 3/2 64x112x112", _max_pool(3, 2, 64, 112)),
            *_over(("GlobalAveragePool",), [(1, 512, 7, 7), (1, 96, 28, 28)], 1),
        ],
        "memory": [(f"{op} {_text(shape)}", _two(op, shape)) for op in ("Add", "Concat") for shape in _ACTIVATIONS]
        + [(f"Transpose {_text(shape)} to {_text(order)}", _transpose(shape, order)) for shape, order in _HEADS],
        "stream": [(f"Add {n}x1024", _two("Add", (n, 1024))) for n in (1024, 2048, 4096, 6144, 8192)],
    }


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _over(ops: Sequence[str], shapes: Sequence[Shape], times: int) -> list[tuple[str, ModelProto]]:
    return [(f"{op} {_text(shape)}", _layers(op, shape, times)) for op in ops for shape in shapes]


def _layers(op: str, shape: Shape, times: int) -> ModelProto:
    """The operator several times in a row, with weights of its own each time."""
    build, width = Build(), shape[-1]
    x = build.input(*shape)
    for _ in range(times):
        if op == "LayerNormalization":
            x = build.norm(x, width)
        elif op == "MatMul":
            x = build.op(op, x, build.weight(width, width, scale=width**-0.5))
        else:
            x = build.op(op, x, *([build.weight(width)] if op == "Add" else []))
    return build.model(x)


def _linear(shape: Shape, layer: Callable[[Build, str, int, int], str]) -> ModelProto:
    """One linear, or several beside each other where one is too short for a clock."""
    m, k, n = shape
    build = Build()
    copies = 16 if m * k * n < 200_000 else 1
    return build.model(*[layer(build, build.input(m, k), k, n) for _ in range(copies)])


def _signs(shape: Shape, activations: int, weights: Any) -> ModelProto:
    m, k, n = shape
    build = Build()
    x = build.input(m, k, dtype=activations)
    zero = build.const(np.zeros((), np.uint8 if activations == UINT8 else np.int8))
    return build.model(build.op("MatMulInteger", x, build.codes(k, n, dtype=weights), zero))


def _conv(shape: Shape, dtype: int) -> ModelProto:
    out, inner, kernel, size, stride, group = shape
    build = Build()
    layer: Callable[..., str] = build.conv if dtype == FLOAT else build.conv_int8
    x = build.input(1, inner * group, size, size, dtype=dtype)
    return build.model(layer(x, (out, inner, kernel, kernel), stride, group))


def _attention(how: str, length: int, width: int) -> ModelProto:
    build, heads = Build(), 12
    if how == "fused":
        qkv = [build.input(1, length, width) for _ in range(3)]
        return build.model(build.op("Attention", *qkv, q_num_heads=heads, kv_num_heads=heads))
    q, v = (build.input(1, heads, length, width // heads) for _ in range(2))
    k = build.input(1, heads, width // heads, length)
    scores = build.op("Mul", build.op("MatMul", q, k), build.const(np.float32(0.1)))
    return build.model(build.op("MatMul", build.op("Softmax", scores), v))


def _skip(shape: Shape) -> ModelProto:
    build = Build()
    return build.model(build.norm(build.op("Add", build.input(*shape), build.input(*shape)), shape[-1]))


def _quantize(op: str, shape: Shape) -> ModelProto:
    build = Build()
    x = build.input(*shape, dtype=UINT8 if op == "DequantizeLinear" else FLOAT)
    if op == "DynamicQuantizeLinear":
        return build.model(build.op(op, x, outputs=3)[0])
    return build.model(build.op(op, x, build.const(np.float32(0.03)), build.const(np.uint8(128))))


def _two(op: str, shape: Shape) -> ModelProto:
    build = Build()
    results = []
    for _ in range(8 if math.prod(shape) < 20_000 else 1):
        x, y = build.input(*shape), build.input(*shape)
        results.append(build.op(op, x, y, axis=0) if op == "Concat" else build.op(op, x, y))
    return build.model(*results)


def _transpose(shape: Shape, order: Shape) -> ModelProto:
    build = Build()
    return build.model(build.op("Transpose", build.input(*shape), perm=list(order)))


def _max_pool(kernel: int, stride: int, channels: int, size: int) -> ModelProto:
    build = Build()
    x = build.input(1, channels, size, size)
    return build.model(build.op("MaxPool", x, kernel_shape=[kernel] * 2, strides=[stride] * 2))


def _models() -> Iterator[tuple[str, ModelProto]]:
    for int8 in (False, True):
        kind = "int8" if int8 else "float32"
        for length, width in ((128, 384), (32, 768)):
            yield f"encoder layer {length}x{width} {kind}", _encoder(length, width, int8)
        yield f"perceptron 16x64 {kind}", _perceptron(int8)
        yield f"residual network {kind}", _network(int8)


def _encoder(length: int, width: int, int8: bool) -> ModelProto:
    build = Build()
    linear = build.linear_int8 if int8 else build.linear
    x = build.input(1, length, width)
    for _ in range(2):
        q, k, v = (linear(x, width, width) for _ in range(3))
        attended = build.op("Attention", q, k, v, q_num_heads=12, kv_num_heads=12)
        x = build.norm(build.op("Sum", x, linear(attended, width, width)), width)
        hidden = build.op("Gelu", linear(x, width, 4 * width))
        x = build.norm(build.op("Sum", x, linear(str(hidden), 4 * width, width)), width)
    return build.model(x)


def _perceptron(int8: bool) -> ModelProto:
    build = Build()
    linear = build.linear_int8 if int8 else build.linear
    x = build.op("Relu", linear(build.input(16, 64), 64, 64))
    return build.model(linear(str(x), 64, 10))


def _network(int8: bool) -> ModelProto:
    build = Build()
    convolve: Callable[..., str] = build.conv_int8 if int8 else build.conv
    x = build.input(1, 3, 64, 64)
    x = convolve(build.quantized(x, 128) if int8 else x, (32, 3, 3, 3), 2)
    for width in (32, 64, 128):
        x = convolve(x, (width, width if width == 32 else width // 2, 3, 3), 1 if width == 32 else 2)
        x = convolve(x, (width, width, 3, 3))
        x = convolve(x, (width, 1, 3, 3), 1, width)
        x = convolve(x, (width, width, 1, 1))
    x = build.op("Flatten", build.op("GlobalAveragePool", build.dequantized(x) if int8 else x))
    return build.model(build.linear(x, 128, 10))
