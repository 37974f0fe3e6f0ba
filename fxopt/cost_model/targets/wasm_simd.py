"""WebAssembly with 128-bit SIMD (simd128), one thread: what every current browser, Node and wasmtime run."""

from fxopt.cost_model.sparse_kernels import BLOCKS_128
from fxopt.ir.target import Target

TARGET = Target(
    name="wasm-simd",
    kind="wasm",
    arch="wasm32",
    backend="tvm",
    source=(
        "peak: a 128-bit multiplication and a 128-bit addition per cycle and pair of pipes (no fused one in simd128); "
        "the rate is what two pairs give at 4.4 GHz, and 16-bit dot products at twice that; bandwidths, launch time "
        "and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.7,
    peak={"float32": 70e9, "int8": 140e9},
    bandwidth=10e9,
    cache_bytes=8 * 2**20,
    cache_bandwidth=30e9,
    launch_seconds=0.05e-6,
    features=frozenset({"simd128"}),
    sparse_kernels=BLOCKS_128,
    efficiency={
        "linear": 0.8,
        "linear.int8": 0.7,
        "conv": 0.7,
        "conv.int8": 0.5,
        "conv.narrow": 0.25,
        "conv.narrow.int8": 0.1,
        "attention": 0.5,
        "norm": 0.2,
        "elementwise": 0.2,
        "quantize": 0.1,
        "other": 0.1,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
