"""Prices of weights of few bits, of code for one core, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.cost_model.roofline import predict
from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.target import Cost

from fxopt.backends.tvm import Tvm  # isort: skip
from tests.backends.tvm import harness  # isort: skip  # skips without the packages
from fxopt.backends.tvm.verify import _limit  # isort: skip

__all__ = ["harness"]

COUNTED = Path(__file__).parents[3] / "benchmarks" / "results" / "decoded_weights.json"


def few_bits(rows: int, inner: int, outputs: int, bits: int) -> Cost:
    packed = torch.empty(outputs, inner * bits // 8, dtype=torch.uint8, device="meta")
    scales = torch.empty(outputs, inner // 32, device="meta")
    return linear_nbits.cost_of(torch.empty(rows, inner, device="meta"), packed, scales, None, None, inner, bits, 32, 16)


@pytest.mark.parametrize("target", ["cortex-a53", "cortex-a76", "wasm-simd"])
def test_predicted_decoding_is_what_was_counted(target: str) -> None:
    """Bounded by arithmetic, the ratio over a float linear is within the error that the target states."""
    found = get_target(target)
    data = json.loads(COUNTED.read_text())["targets"][target]
    assert len(data) == 3
    for shape, record in data.items():
        rows, inner, outputs = map(int, shape.split("x"))
        if found.kind == "wasm" and rows < 64:
            continue  # timed: calls of small linears take as long as their work
        plain = predict(Cost(2.0 * rows * inner * outputs, 0, "float32", "linear"), found).seconds
        for bits in (2, 4, 8):
            price = Tvm().predicted(few_bits(rows, inner, outputs, bits), found)
            assert price is not None and price.bound == "compute"
            counted = record["amounts"][f"{bits} bits"] / record["amounts"]["float32"]
            slack = 1 + found.interval if rows < 8 else 1.25
            assert counted / slack < price.seconds / plain < counted * slack, (shape, bits)


def test_decoding_does_not_grow_with_rows() -> None:
    target = get_target("cortex-a76")
    few, many = (Tvm().predicted(few_bits(rows, 512, 512, 4), target) for rows in (8, 64))
    assert few is not None and many is not None
    assert many.seconds < 8 * few.seconds * 0.7


def test_the_roofline_prices_everything_else() -> None:
    assert Tvm().predicted(Cost(1e6, 1e3, "float32", "linear"), get_target("cortex-a76")) is None


def test_code_for_one_core_is_priced_on_one() -> None:
    model, x = nn.Linear(512, 512), torch.randn(64, 512)
    target = get_target("cortex-a53")
    assert target.cores > 1
    one = fxopt.predict(model, "cortex-a53", example_inputs=(x,)).total.seconds
    assert one > 2 * 64 * 512 * 512 / target.peak["float32"]


def test_rounding_the_input_for_nothing_is_refused_and_auto_does_not() -> None:
    reason = Tvm().supports("linear_nbits", "int4", "group=32,activations=int8")
    assert "rounding the input gains nothing: use activations=float" in reason
    assert Tvm().supports("linear_nbits", "int4", "group=32,activations=float") == ""
    model, x = nn.Linear(512, 512), torch.randn(2, 512)
    options = {"objective": "size", "budget": None, "calibration": [(x,)], "example_inputs": (x,)}
    chosen = fxopt.explain(model, "wasm-simd", passes=["quantize-linear{bits=4}"], **options)
    assert ["activations=float" in row.setting for row in chosen.select(outcome="applied")] == [True]
    refused = fxopt.explain(model, "wasm-simd", passes=["quantize-linear{bits=4,activations=int8}"], **options)
    assert ["use activations=float" in row.reason for row in refused.select(pass_name="quantize-linear")] == [True]


@pytest.mark.parametrize(("activation_bits", "limit"), [(8, 3e-2), (16, 3e-4)])
def test_a_last_digit_may_turn_rounded_inputs(activation_bits: int, limit: float) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.full((8, 16), 0x5A, dtype=torch.uint8))
            self.register_buffer("scales", torch.ones(8, 1))

        def forward(self, x: torch.Tensor) -> Any:
            return linear_nbits.target(x, self.packed, self.scales, None, None, 32, 4, 32, activation_bits)

    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    graph = load(Rounded().eval(), (x,))
    assert _limit(graph, [x], graph.run([x])) == limit
