"""NVIDIA B200 SXM, 180 GB."""

from fxopt.ir.target import Target

TARGET = Target(
    name="b200",
    kind="cuda",
    arch="sm_100",
    backend="triton",
    source=(
        "NVIDIA HGX B200 data sheet (a GPU of eight, half of the rates stated with sparsity); L2 size as its driver "
        "reports it; "
        "launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float64": 37e12,
        "float32": 75e12,
        "tf32": 1100e12,
        "float16": 2250e12,
        "bfloat16": 2250e12,
        "float8": 4500e12,
        "int8": 4500e12,
    },
    sparse_24={"tf32": 2200e12, "float16": 4500e12, "bfloat16": 4500e12, "float8": 9000e12, "int8": 9000e12},
    bandwidth=7.7e12,
    cache_bytes=126 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
    launch_seconds=3e-6,
    features=frozenset({"mma", "cp_async", "tcgen05", "tma", "fp8", "sparse_24"}),
    efficiency={
        "linear": 0.55,
        "conv": 0.4,
        "attention": 0.35,
        "norm": 0.5,
        "elementwise": 0.5,
        "quantize": 0.5,
        "other": 0.25,
        "memory": 0.85,
    },
)
