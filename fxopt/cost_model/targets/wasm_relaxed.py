"""WebAssembly with relaxed SIMD: fused multiply-add and 8-bit dot product where the processor has them.

On by default from Node 22 on and in wasmtime; not in every browser, so results hold a `wasm-simd` build too.
"""

import dataclasses

from fxopt.cost_model.targets.wasm_simd import TARGET as WASM

TARGET = dataclasses.replace(
    WASM,
    name="wasm-relaxed",
    source=(
        "as wasm-simd, with the WebAssembly relaxed SIMD proposal's i32x4.relaxed_dot_i8x16_i7x16_add_s at four times "
        "the rate of floats; no gain in float32 is assumed"
    ),
    peak={"float32": 70e9, "int8": 280e9},
    features=frozenset({"simd128", "relaxed_simd"}),
)
