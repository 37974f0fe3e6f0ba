"""x86-64 with AVX-512 and its 8-bit dot product (VNNI): Ice Lake, Zen 4 and later."""

from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx512-vnni",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source=(
        "peak: 2 fused multiply-adds of 16 floats per cycle at 4.4 GHz, 8-bit dot products at 4 times that; factors "
        "and bandwidths read off times of ONNX Runtime 1.32 kernels on one core of an AMD EPYC, Zen 5; launch "
        "time and narrow convolutions as x86-avx2"
    ),
    error="never measured with benchmarks/host_rates.py; no kernel was held out",
    interval=0.5,
    peak={"float32": 282e9, "int8": 1126e9},
    bandwidth=30e9,
    cache_bytes=16 * 2**20,
    cache_bandwidth=90e9,
    launch_seconds=0.5e-6,
    features=frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni"}),
    efficiency={
        "linear": 0.94,
        "linear.int8": 0.81,
        "linear.uint8": 0.37,
        "linear.s8s8": 0.042,
        "conv": 0.84,
        "conv.int8": 0.62,
        "conv.narrow": 0.25,
        "conv.narrow.int8": 0.05,
        "attention": 0.52,
        "norm": 0.1,
        "norm.skip": 0.011,
        "elementwise": 0.21,
        "quantize": 0.08,
        "other": 0.05,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
