"""WebAssembly with relaxed SIMD: fused multiply-add and 8-bit dot product where the processor has them.

On by default from Node 22 on and in wasmtime; not in every browser, so results hold a `wasm-simd` build too.
"""

import dataclasses

from fxopt.cost_model.sparse_rates import measured_kernels
from fxopt.cost_model.targets.wasm_simd import TARGET as WASM

TARGET = dataclasses.replace(
    WASM,
    name="wasm-relaxed",
    sparse_kernels=measured_kernels("wasm-relaxed"),
    source=(
        "as wasm-simd, with the WebAssembly relaxed SIMD proposal's i32x4.relaxed_dot_i8x16_i7x16_add_s at four times "
        "the rate of floats; no gain in float32 is assumed"
    ),
    error=(
        "28 % mean error on 62 held-out rows, 43 % on whole models, in Node on one core of an AMD "
        "EPYC, Zen 5 (benchmarks/compiled_rates.py)"
    ),
    interval=0.75,
    peak={"float32": 70e9, "int8": 280e9},
    cache_bandwidth=100e9,
    launch_seconds=0.0072e-6,
    features=frozenset({"simd128", "relaxed_simd"}),
    efficiency={
        "linear": 0.8,
        "linear.int8": 0.8,
        "conv": 0.75,
        "conv.int8": 0.64,
        "conv.narrow": 0.42,
        "conv.narrow.int8": 0.2,
        "attention": 0.54,
        "norm": 0.32,
        "elementwise": 0.18,
        "quantize": 0.1,
        "other": 0.13,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
