"""64-bit Arm with NEON and the 8-bit dot product: Neoverse N1 (Graviton 2, Ampere Altra), Cortex-A76 and later."""

from fxopt.ir.target import Target

TARGET = Target(
    name="aarch64",
    kind="cpu",
    arch="aarch64",
    backend="onnxruntime",
    source=(
        "peak: two 128-bit FMLA and two 128-bit UDOT per cycle (Arm Neoverse N1 Software Optimization Guide) at 2.5 "
        "GHz; bandwidths, launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.6,
    peak={"float32": 40e9, "int8": 160e9},
    bandwidth=10e9,
    cache_bytes=8 * 2**20,
    cache_bandwidth=25e9,
    launch_seconds=0.8e-6,
    features=frozenset({"neon", "dotprod"}),
    efficiency={
        "linear": 0.7,
        "linear.int8": 0.6,
        "conv": 0.6,
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
