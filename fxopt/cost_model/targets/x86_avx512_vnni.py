"""x86-64 with AVX-512 and its 8-bit dot product (VNNI): Ice Lake, Zen 4 and later."""

from fxopt.cost_model.sparse_kernels import OWN_INT8
from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx512-vnni",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source=(
        "peak: 2 fused multiply-adds of 16 floats per cycle at 4.4 GHz, 8-bit dot products at 4 times that; the rest "
        "fitted to times of ONNX Runtime 1.32 on one core of an AMD EPYC, Zen 5, by benchmarks/host_rates.py; "
        "parallel: as x86-avx2"
    ),
    error=(
        "mean 16 % over 91 held-out operators and models (90 % of them within 37 %), 10 % over whole models; measured "
        "with benchmarks/host_rates.py on one thread of one machine"
    ),
    interval=0.4,
    peak={"float32": 282e9, "int8": 1126e9},
    bandwidth=4.3e10,
    cache_bytes=16 * 2**20,
    cache_bandwidth=1.0e11,
    launch_seconds=2.4e-7,
    features=frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni"}),
    sparse_kernels=OWN_INT8,
    efficiency={
        "linear": 0.9,
        "linear.int8": 0.75,
        "linear.uint8": 0.36,
        "linear.s8s8": 0.026,
        "conv": 0.92,
        "conv.int8": 0.79,
        "conv.narrow": 0.3,
        "conv.narrow.int8": 0.061,
        "attention": 0.59,
        "norm": 0.13,
        "norm.skip": 0.011,
        "elementwise": 0.21,
        "quantize": 0.13,
        "other": 0.024,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
