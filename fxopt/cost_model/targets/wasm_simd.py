"""WebAssembly with 128-bit SIMD (simd128), one thread: what every current browser, Node and wasmtime run."""

from fxopt.cost_model.sparse_rates import measured_kernels
from fxopt.ir.target import Target

TARGET = Target(
    name="wasm-simd",
    kind="wasm",
    arch="wasm32",
    backend="tvm",
    source=(
        "peak: a 128-bit multiplication and a 128-bit addition per cycle and pair of pipes (no fused one in simd128); "
        "the rate is what two pairs give at 4.4 GHz, and 16-bit dot products at twice that; memory bandwidth "
        "is an assumption, cache bandwidth, launch time and efficiency factors were fitted"
    ),
    error=(
        "36 % mean error on 62 held-out rows, 23 % on whole models, in Node on one core of an AMD "
        "EPYC, Zen 5 (benchmarks/compiled_rates.py)"
    ),
    interval=0.8,
    peak={"float32": 70e9, "int8": 140e9},
    bandwidth=10e9,
    cache_bytes=8 * 2**20,
    cache_bandwidth=99e9,
    launch_seconds=0.0049e-6,
    features=frozenset({"simd128"}),
    sparse_kernels=measured_kernels("wasm-simd"),
    efficiency={
        "linear": 0.8,
        "linear.int8": 0.75,
        "conv": 0.4,
        "conv.int8": 0.66,
        "conv.narrow": 0.45,
        "conv.narrow.int8": 0.35,
        "attention": 0.32,
        "norm": 0.32,
        "elementwise": 0.13,
        "quantize": 0.1,
        "other": 0.13,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
