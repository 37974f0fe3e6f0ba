"""x86-64 with AVX2 and FMA but no 8-bit dot product (VNNI): Haswell to Skylake clients, Zen 1 to Zen 3."""

from fxopt.ir.target import Target

TARGET = Target(
    name="x86-avx2",
    kind="cpu",
    arch="x86-64",
    backend="onnxruntime",
    source=(
        "peak: 2 fused multiply-adds of 8 floats per cycle at 3.5 GHz, 8-bit products at twice that (vpmaddubsw, "
        "vpmaddwd, vpaddd); the rest fitted to times of ONNX Runtime 1.32 on one core of an AMD EPYC, Zen 3, by "
        "benchmarks/host_rates.py; parallel: how a ResNet-50 scaled to two cores of another machine"
    ),
    error=(
        "mean 12 % over 91 held-out operators and models (90 % of them within 28 %), 14 % over whole models; measured "
        "with benchmarks/host_rates.py on one thread of one machine"
    ),
    interval=0.3,
    peak={"float32": 112e9, "int8": 224e9},
    bandwidth=1.3e10,
    cache_bytes=16 * 2**20,  # what is effective of a shared last-level cache
    cache_bandwidth=4.8e10,
    launch_seconds=5.2e-7,
    features=frozenset({"avx2", "fma"}),
    efficiency={
        "linear": 0.73,
        "linear.int8": 0.72,
        "linear.uint8": 0.59,
        "linear.s8s8": 0.083,
        "conv": 0.73,
        "conv.int8": 0.72,
        "conv.narrow": 0.2,
        "conv.narrow.int8": 0.09,
        "attention": 0.52,
        "norm": 0.17,
        "norm.skip": 0.018,
        "elementwise": 0.2,
        "quantize": 0.067,
        "other": 0.028,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
