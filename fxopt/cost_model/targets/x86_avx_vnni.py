"""x86-64 with AVX2 and the 256-bit 8-bit dot product (AVX-VNNI): Alder Lake and later client processors."""

from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx-vnni",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source=(
        "peak: 2 fused multiply-adds of 8 floats per cycle at 4 GHz (an assumption), 8-bit dot products at 4 times "
        "that; everything else as x86-avx2, by assumption"
    ),
    error="never measured",
    interval=0.6,
    peak={"float32": 128e9, "int8": 512e9},
    bandwidth=15e9,
    cache_bytes=16 * 2**20,
    cache_bandwidth=45e9,
    launch_seconds=0.6e-6,
    features=frozenset({"avx2", "fma", "avx_vnni"}),
    efficiency={
        "linear": 0.7,
        "linear.int8": 0.6,
        "linear.uint8": 0.4,
        "linear.s8s8": 0.04,
        "conv": 0.6,
        "conv.int8": 0.5,
        "conv.narrow": 0.25,
        "conv.narrow.int8": 0.05,
        "attention": 0.5,
        "norm": 0.14,
        "norm.skip": 0.017,
        "elementwise": 0.18,
        "quantize": 0.06,
        "other": 0.05,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
