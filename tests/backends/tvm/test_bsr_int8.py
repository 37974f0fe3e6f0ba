"""Block-sparse 8-bit products give the integers of the dense ones, on every machine; zeros are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from tests.backends.tvm.harness import EMULATED, RUNNABLE, Builder, build, guarded, machine, randn

from fxopt.backends.tvm import Tvm, qemu  # isort: skip
from fxopt.backends.tvm.codes import Levels  # isort: skip
from fxopt.backends.tvm.kernels.bsr_int8 import bsr_int8, is_exact, pack_blocks, panel_rows, sparse_form  # isort: skip
from fxopt.backends.tvm.kernels.dense import pack_bias  # isort: skip
from fxopt.backends.tvm.kernels.dot import DOTS, column_sums, dot_for, in_groups  # isort: skip
from fxopt.backends.tvm.kernels.results_int8 import Product  # isort: skip
from fxopt.backends.tvm.values import tvm_type  # isort: skip

__all__ = ["build"]
TARGETS = (*RUNNABLE, "x86-avx2", *EMULATED)
SHAPES = [(1, 1, 1), (1, 70, 20), (3, 13, 5), (4, 64, 33), (7, 131, 48), (37, 50, 24)]  # rows, inputs, outputs


def sparse_codes(outputs: int, inner: int, width: int, density: float, limit: int = 127) -> np.ndarray[Any, Any]:
    """Codes whose blocks of `width` outputs x 1 input are zero or not as a whole."""
    random = np.random.default_rng((outputs, inner, width))
    kept = np.repeat(random.random((-(-outputs // width), inner)) < density, width, 0)[:outputs]
    return (random.integers(-limit, limit + 1, (outputs, inner)) * kept).astype(np.int8)


def run_product(
    build: Builder, target: str, shape: tuple[int, int, int], codes: Any, width: int, *, ranged: bool = False
) -> tuple[Any, Any]:
    """The results of the kernel, and the exact ones."""
    m, (rows, inner, outputs) = machine(target), shape
    dot = dot_for(m, codes)
    blocks, zero = pack_blocks(codes, width, dot), 131
    if not is_exact(blocks, dot):
        dot = DOTS["vpmaddwd"]
        blocks = pack_blocks(codes, width, dot)
    levels, size = Levels(0.04, zero, dot.x), Product(rows, inner, outputs, ranged=ranged)
    q = np.random.default_rng(1).integers(0, 256, (rows, inner))
    q[0] = 255  # the largest sums
    whole = np.zeros((rows, in_groups(inner, dot)), tvm_type(dot.x.dtype))
    whole[:, :inner] = q - levels.shift
    scales, bias = np.random.default_rng(2).random(outputs).astype(np.float32), randn(outputs)
    factor = 1 if ranged else levels.shift - zero
    given_ = [whole, *(array if len(array) else np.zeros(16, array.dtype) for array in (blocks.weights, blocks.inputs))]
    given_ += [blocks.firsts, (factor * column_sums(codes, width)).astype(np.int32)]
    given_ += [pack_bias(array, outputs, width) for array in (scales, bias)]
    given_ += [np.array([0.5, zero], np.float32)] if ranged else []
    high = panel_rows(size, dot)
    given_ += [guarded(high * whole.shape[1], dtype=whole.dtype)] if high else []
    y = guarded(rows, outputs)
    build(bsr_int8("s", size, blocks.groups, width, dot, m), m)("s", *given_, y)
    total = (q - zero) @ codes.astype(np.int64).T
    return y, (total * scales.astype(np.float64) * (0.5 if ranged else 1.0), bias.astype(np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(build: Builder, target: str, shape: tuple[int, int, int], limit: int) -> None:
    for width in (8, 16) if machine(target).family == "x86" else (8, 4):
        codes = sparse_codes(shape[2], shape[1], width, 0.3, limit)
        y, (total, bias) = run_product(build, target, shape, codes, width)
        assert (np.abs(y - (total + bias)) <= 3 * np.finfo(np.float32).eps * (np.abs(total) + np.abs(bias))).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_ranges_found_at_run_time(build: Builder, target: str) -> None:
    shape = (9, 40, 24)
    y, (total, bias) = run_product(build, target, shape, sparse_codes(24, 40, 8, 0.3, 63), 8, ranged=True)
    assert (np.abs(y - (total + bias)) <= 4 * np.finfo(np.float32).eps * (np.abs(total) + np.abs(bias))).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_of_zeros(build: Builder, target: str) -> None:
    y, (_, bias) = run_product(build, target, (5, 16, 8), np.zeros((8, 16), np.int8), 8)
    assert (y == np.broadcast_to(bias, y.shape)).all()


class SparseConv(nn.Module):
    """An 8-bit convolution, 30 % of whose blocks of 4 outputs are kept."""

    def __init__(self, outputs: int, inner: int, kernel: int, stride: int, limit: int) -> None:
        super().__init__()
        codes = sparse_codes(outputs, inner * kernel**2, 4, 0.3, limit).reshape(outputs, inner, kernel, kernel)
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("scales", torch.from_numpy(np.abs(randn(outputs)) * np.float32(0.01)))
        self.register_buffer("bias", torch.from_numpy(randn(outputs, seed=1)))
        self.how = ([stride] * 2, [kernel // 2] * 4, [1, 1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """On levels of 0.05."""
        return conv_w8a8.target(x, self.codes, self.scales, self.bias, 1 / 50, 100, 0.05, 120, *self.how)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("target", ["wasm-simd", "wasm-relaxed", *EMULATED])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [((33, 18), 1, 1, 9), ((8, 16), 3, 2, 7), ((12, 8), 1, 1, 4), ((5, 12), 3, 1, 3), ((64, 32), 1, 1, 14)],
)
def test_convolutions(
    tmp_path: Path, target: str, channels: tuple[int, int], kernel: int, stride: int, size: int, limit: int
) -> None:
    inner, outputs = channels
    model, x = SparseConv(outputs, inner, kernel, stride, limit).eval(), torch.from_numpy(randn(2, inner, size, size))
    executable: Any = Tvm().compile(load(model, (x,)), get_target(target))
    assert any("conv_bsr_int8" in step for step in executable.steps)
    if target in EMULATED:
        if qemu.missing():
            pytest.skip(qemu.missing())
        (built,) = executable.package.builds
        (found,), _ = qemu.run_entry(built, built.entries[0], [x.numpy()], tmp_path)
    else:
        found = executable.run((x,))[0].numpy()
    levels = np.abs(found - model(x).numpy()) / 0.05
    assert levels.max() < 1.01 and (levels > 0.5).mean() < 1e-3  # of halves, the other neighbour


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.floats(0, 1), st.sampled_from(sorted(DOTS))
)  # fmt: skip
@settings(max_examples=60)
def test_packs_without_loss(outputs: int, inner: int, width: int, density: float, instruction: str) -> None:
    dot = DOTS[instruction]
    codes = sparse_codes(outputs, inner, width, density, 63)
    blocks = pack_blocks(codes, width, dot)
    found = np.zeros((-(-outputs // width), inner, width), np.int64)
    weights = blocks.weights.astype(np.int64).transpose(0, 2, 1) - dot.raised  # [groups, group, width]
    for row in range(len(found)):
        part = slice(blocks.firsts[row], blocks.firsts[row + 1])
        np.add.at(found[row], blocks.inputs[part].reshape(-1), weights[part].reshape(-1, width))
    assert (found.transpose(0, 2, 1).reshape(-1, inner)[:outputs] == codes).all()
    assert blocks.groups * dot.group < np.count_nonzero(found.any(-1)) + dot.group * (len(found) + 1)


def test_only_enough_zeros_are_skipped() -> None:
    for target in ("wasm", "wasm-relaxed", "cortex-a53", "cortex-a76"):
        m = machine(target)
        for density, wanted in ((1.0, False), (0.1, True)):
            codes = sparse_codes(64, 256, 8, density, 63)
            form = sparse_form(codes, 64, dot_for(m, codes), m)
            assert (form is not None) == wanted
        narrow = sparse_form(sparse_codes(64, 256, 4, 0.1, 63), 64, dot_for(m, codes), m)
        assert narrow is not None and narrow.width == 4
