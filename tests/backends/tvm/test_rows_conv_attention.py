"""Softmax, norms, activations, convolutions and attention against torch in float64, over odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.tvm.harness import EMULATED, RUNNABLE, Builder, build, guarded, machine, randn

from fxopt.backends.tvm.emit import Kernel, each  # isort: skip
from fxopt.backends.tvm.kernels import approximations  # isort: skip
from fxopt.backends.tvm.kernels.activations import ACTIVATIONS, apply  # isort: skip
from fxopt.backends.tvm.kernels.attention import Attention, Placed, attention  # isort: skip
from fxopt.backends.tvm.kernels.bsr import pack_bsr  # isort: skip
from fxopt.backends.tvm.kernels.conv import Conv, conv, pack_conv, pack_conv_bias  # isort: skip
from fxopt.backends.tvm.kernels.depthwise import depthwise, depthwise_scratch  # isort: skip
from fxopt.backends.tvm.kernels.rows import layer_norm, rms_norm, softmax  # isort: skip

__all__ = ["build"]
pytestmark = pytest.mark.slow
F = torch.nn.functional
TARGETS = (*RUNNABLE, *EMULATED)
ULP = float(np.finfo(np.float32).eps)


def double(x: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(x).double()


def pointwise(name: str, size: int, function: Any, lanes: int) -> Any:
    kernel = Kernel(name)
    x, y = kernel.buffer("x", size), kernel.buffer("y", size)
    each(kernel, size, lanes, lambda at, n: kernel.store(y, at, function(kernel, kernel.load(x, at, n), n), n))
    return kernel.function()


EXACT = {
    "exp": torch.exp,
    "erf": torch.erf,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
RELATIVE = {"exp": 2, "tanh": 3, "sigmoid": 3, "silu": 4}  # units in the last place
ABSOLUTE = {"erf": 2.4e-7, "relu": 0.0, "relu6": 0.0, "hardswish": 4e-7, "hardsigmoid": 2e-7}


@pytest.mark.parametrize("target", TARGETS)
def test_activations(build: Builder, target: str) -> None:
    x = np.concatenate([
        np.linspace(-20, 20, 40_003), np.linspace(-1e-3, 1e-3, 1000), np.linspace(-86, 88.7, 1000),
        [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 89.0, -104.0],
    ]).astype(np.float32)  # fmt: skip
    m = machine(target)

    def function(name: str) -> Any:
        if name in ACTIVATIONS:
            return lambda kernel, value, lanes: apply(kernel, name, value, lanes)
        return getattr(approximations, name)

    run = build([pointwise(name, x.size, function(name), m.lanes) for name in EXACT], m)
    for name, exact in EXACT.items():
        y = guarded(x.size)
        run(name, x, y)
        expected = exact(double(x)).numpy()
        assert (np.isnan(y) == np.isnan(expected)).all(), f"{name}: NaN at {x[np.isnan(y) != np.isnan(expected)]}"
        inside = np.isfinite(expected) & (np.abs(expected) < 3.4e38)
        infinite = np.isinf(expected)
        assert (y[infinite] == expected[infinite]).all(), name
        error = np.abs(y[inside] - expected[inside])
        if name in RELATIVE:
            assert (error <= RELATIVE[name] * ULP * np.abs(expected[inside]) + 3e-38).all(), (name, error.max())
        elif name in ABSOLUTE:
            assert (error <= ABSOLUTE[name] * np.maximum(1, np.abs(expected[inside]))).all(), (name, error.max())
        else:  # x times a function within 2.5e-7
            assert (error <= 2.5e-7 * np.maximum(1e-30, np.abs(x[inside]))).all(), (name, error.max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "size"), [(3, 1), (5, 7), (4, 64), (2, 131)])
def test_rows(build: Builder, target: str, rows: int, size: int) -> None:
    m = machine(target)
    functions = [
        softmax("softmax", rows, size, m),
        layer_norm("norm", rows, size, 1e-5, m, affine=(True, True)),
        layer_norm("plain", rows, size, 1e-5, m, affine=(False, False)),
        rms_norm("rms", rows, size, 1e-6, m, weighted=True),
    ]
    run = build(functions, m)
    x = 3 * randn(rows, size) + 10
    w, b = randn(size), randn(size, seed=1)
    y = guarded(rows, size)
    run("softmax", x, y)
    expected = torch.softmax(double(x), -1)
    shift = (x.max(-1, keepdims=True) - x).astype(np.float64)  # rounded once, before exp
    assert (abs(y - expected.numpy()) <= (8 + shift) * ULP * expected.numpy() + 1e-37).all()
    for name, arrays, exact in (
        ("norm", (x, w, b, y), F.layer_norm(double(x), (size,), double(w), double(b))),
        ("plain", (x, y), F.layer_norm(double(x), (size,))),
        ("rms", (x, w, y), F.rms_norm(double(x), (size,), double(w), 1e-6)),
    ):
        y[...] = np.nan
        run(name, *arrays)
        theirs = {
            "norm": F.layer_norm(torch.from_numpy(x), (size,), torch.from_numpy(w), torch.from_numpy(b)),
            "plain": F.layer_norm(torch.from_numpy(x), (size,)),
            "rms": F.rms_norm(torch.from_numpy(x), (size,), torch.from_numpy(w), 1e-6),
        }[name]
        limit = 2 * float((theirs - exact).abs().max()) + 20 * ULP
        assert np.abs(y - exact.numpy()).max() <= limit, name


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_of_infinite_and_nan(build: Builder, target: str) -> None:
    m = machine(target)
    x = np.zeros((4, 19), np.float32)
    x[0, 3] = x[1, 17] = np.nan
    x[2, :] = -np.inf
    x[3, 5:] = -np.inf
    y = guarded(4, 19)
    build(softmax("softmax", 4, 19, m), m)("softmax", x, y)
    assert np.isnan(y[:3]).all()
    np.testing.assert_allclose(y[3], torch.softmax(double(x[3]), -1), rtol=1e-6)


CONVOLUTIONS = [
    Conv(2, 3, 9, 7, 5, (3, 3), (1, 1), (1, 1, 1, 1)),
    Conv(1, 4, 12, 11, 9, (3, 2), (2, 2), (0, 1, 1, 0), (1, 2)),
    Conv(1, 8, 6, 5, 13, (1, 1)),
    Conv(1, 6, 8, 8, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    Conv(1, 5, 7, 7, 4, (1, 1), (2, 2)),
    Conv(1, 2, 5, 5, 3, (5, 5), (1, 1), (4, 4, 4, 4)),
    Conv(1, 64, 30, 30, 8, (3, 3), (1, 1), (1, 1, 1, 1)),
]


def exact_conv(size: Conv, x: Any, w: Any, b: Any) -> torch.Tensor:
    top, left, bottom, right = size.pads
    padded = F.pad(double(x), (left, right, top, bottom))
    return F.conv2d(padded, double(w), double(b), size.stride, 0, size.dilation, size.groups)


def check(size: Conv, y: Any, x: Any, w: Any, b: Any) -> None:
    exact = exact_conv(size, x, w, b).numpy()
    magnitude = exact_conv(size, np.abs(x), np.abs(w), np.abs(b)).numpy()
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= (size.inner + 2) * ULP / 2 * magnitude).all()


@pytest.mark.parametrize("target", TARGETS)
def test_conv(build: Builder, target: str) -> None:
    m = machine(target)
    run = build([conv(f"c{i}", size, m) for i, size in enumerate(CONVOLUTIONS)], m)
    for i, s in enumerate(CONVOLUTIONS):
        x = randn(s.batch, s.channels, s.height, s.width)
        w, b = randn(s.outputs, s.channels // s.groups, *s.kernel), randn(s.outputs)
        y = guarded(s.batch, s.outputs, s.out_height, s.out_width)
        scratch = [guarded(s.scratch)] if s.scratch else []
        run(
            f"c{i}",
            x,
            pack_conv(w, s.groups, m.outputs),
            pack_conv_bias(b, s.outputs, s.groups, m.outputs),
            *scratch,
            y,
        )
        check(s, y, x, w, b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [CONVOLUTIONS[2], CONVOLUTIONS[0]])
def test_sparse_conv(build: Builder, target: str, size: Conv) -> None:
    m = machine(target)
    keep = np.random.default_rng(0).random((-(-size.outputs // m.outputs), size.inner)) < 0.4
    flat = randn(size.outputs, size.inner) * np.repeat(keep, m.outputs, 0)[: size.outputs]
    packed = pack_bsr(flat, m.outputs)
    x, b = randn(size.batch, size.channels, size.height, size.width), randn(size.outputs)
    y = guarded(size.batch, size.outputs, size.out_height, size.out_width)
    scratch = [guarded(size.scratch)] if size.scratch else []
    run = build(conv("c", size, m, kept=len(packed.values)), m)
    bias = pack_conv_bias(b, size.outputs, 1, m.outputs)
    run("c", x, packed.values, packed.inputs, packed.starts, bias, *scratch, y)
    check(size, y, x, flat.reshape(size.outputs, size.channels, *size.kernel), b)


DEPTHWISE = [
    Conv(1, 3, 9, 7, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    Conv(2, 4, 12, 11, 8, (3, 3), (2, 2), (0, 1, 1, 2), (1, 1), 4),
    Conv(1, 2, 10, 13, 2, (5, 5), (3, 2), (2, 2, 2, 2), (1, 2), 2),
    Conv(1, 2, 3, 3, 2, (2, 3), (1, 1), (3, 4, 3, 4), (1, 1), 2),
]


@pytest.mark.parametrize("target", TARGETS)
def test_depthwise(build: Builder, target: str) -> None:
    m = machine(target)
    run = build([depthwise(f"c{i}", size, m) for i, size in enumerate(DEPTHWISE)], m)
    for i, s in enumerate(DEPTHWISE):
        x, w, b = randn(s.batch, s.channels, s.height, s.width), randn(s.outputs, 1, *s.kernel), randn(s.outputs)
        y = guarded(s.batch, s.outputs, s.out_height, s.out_width)
        run(f"c{i}", x, w, b, guarded(depthwise_scratch(s)), y)
        check(s, y, x, w, b)


def placed(batch: int, heads: int, rows: int, width: int, heads_last: bool) -> Placed:
    """[batch, heads, rows, width], or [batch, rows, heads, width] with three more values in each row."""
    if not heads_last:
        return Placed((heads * rows * width, rows * width, width), 0, batch * heads * rows * width)
    step = heads * width + 3
    return Placed((rows * step, width, step), 2, batch * rows * step)


def lying(values: np.ndarray[Any, Any], place: Placed) -> np.ndarray[Any, Any]:
    """The memory of an operand [batch, heads, rows, width]."""
    memory = np.full(place.count, np.nan, np.float32)
    steps = tuple(4 * step for step in (*place.strides, 1))
    np.lib.stride_tricks.as_strided(memory[place.offset :], values.shape, steps)[...] = values
    return memory


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", ["", "float32", "bool"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_last", [False, True])
def test_attention(build: Builder, target: str, mask: Any, causal: bool, heads_last: bool) -> None:
    if mask and causal:
        pytest.skip("torch takes one of them")
    m = machine(target)
    shapes = [(2, 4, 2, 9, 13, 8, 5), (1, 1, 1, 1, 1, 3, 3), (1, 2, 2, 33, 33, 16, 16)]
    sizes = []
    for batch, heads, key_heads, queries, keys, width, value_width in shapes:
        places = (
            placed(batch, heads, queries, width, heads_last), placed(batch, key_heads, keys, width, heads_last),
            placed(batch, key_heads, keys, value_width, heads_last),
        )  # fmt: skip
        strides = ((queries * keys, 0, keys), batch * queries * keys) if mask else ((0, 0, 0), 0)
        shape = (batch, heads, key_heads, queries, keys, width, value_width)
        sizes.append(Attention(*shape, 0.3, places, causal, mask, *strides))
    run = build([attention(f"a{i}", size, m) for i, size in enumerate(sizes)], m)
    for i, s in enumerate(sizes):
        q = randn(s.batch, s.heads, s.queries, s.width)
        k, v = randn(s.batch, s.key_heads, s.keys, s.width), randn(s.batch, s.key_heads, s.keys, s.value_width)
        y = guarded(s.batch, s.queries, s.heads, s.value_width)
        values = randn(s.batch, 1, s.queries, s.keys)
        keep = (values > -1) | (np.arange(s.keys) == 0)
        keep[:, :, -1] = False  # a query without any key
        values[:, :, -1] = -np.inf
        given = {"": None, "float32": values, "bool": keep}[mask]
        arrays = [] if given is None else [given.astype(np.uint8) if mask == "bool" else given]
        operands = [lying(array, place) for array, place in zip((q, k, v), s.placed, strict=True)]
        run(f"a{i}", *operands, *arrays, guarded(s.scratch), y)
        bias = None if given is None else torch.from_numpy(given) if mask == "bool" else double(given)
        exact = F.scaled_dot_product_attention(
            double(q), double(k), double(v), bias, is_causal=causal, scale=0.3, enable_gqa=True
        )
        assert np.abs(y - exact.transpose(1, 2).numpy()).max() <= 40 * ULP
