"""x86-64 with AVX2 and FMA but no 8-bit dot product (VNNI)."""

from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx2",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source="peak: 2 fused multiply-adds of 8 floats per cycle at 3.5 GHz; the rest was fitted",
    error="never measured",
    interval=0.4,
    peak={"float32": 112e9, "int8": 224e9},
    bandwidth=18e9,
    cache_bytes=8 * 2**20,
    cache_bandwidth=40e9,
    launch_seconds=0.5e-6,
    cores=1,
    features=frozenset({"avx2", "fma"}),
    efficiency={
        "linear": 0.78,
        "linear.int8": 0.76,
        "linear.uint8": 0.58,
        "linear.s8s8": 0.11,
        "conv": 0.7,
        "conv.int8": 0.7,
        "conv.narrow": 0.2,
        "conv.narrow.int8": 0.1,
        "attention": 0.6,
        "norm": 0.17,
        "norm.skip": 0.02,
        "elementwise": 0.2,
        "quantize": 0.04,
        "other": 0.1,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
