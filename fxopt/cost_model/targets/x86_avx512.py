"""x86-64 with AVX-512 but no 8-bit dot product (VNNI): Skylake servers."""

from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx512",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source=(
        "peak: 2 fused multiply-adds of 16 floats per cycle at 2.7 GHz (an assumption for all cores busy), 8-bit "
        "products at twice that (vpmaddubsw, vpmaddwd, vpaddd); everything else as x86-avx2, by assumption"
    ),
    error="never measured",
    interval=0.6,
    peak={"float32": 173e9, "int8": 346e9},
    bandwidth=12e9,
    cache_bytes=16 * 2**20,
    cache_bandwidth=45e9,
    launch_seconds=0.6e-6,
    features=frozenset({"avx2", "fma", "avx512f", "avx512bw"}),
    efficiency={
        "linear": 0.7,
        "linear.int8": 0.7,
        "linear.uint8": 0.55,
        "linear.s8s8": 0.06,
        "conv": 0.6,
        "conv.int8": 0.6,
        "conv.narrow": 0.25,
        "conv.narrow.int8": 0.1,
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
