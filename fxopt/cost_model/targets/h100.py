"""NVIDIA H100 SXM5, 80 GB."""

from fxopt.ir.target import Target

TARGET = Target(
    name="h100",
    kind="cuda",
    arch="sm_90",
    backend="triton",
    source=(
        "NVIDIA H100 Tensor Core GPU data sheet (SXM5, half of the rates stated with sparsity) and the Hopper white "
        "paper (L2 size); launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float64": 34e12,
        "float32": 67e12,
        "tf32": 494.7e12,
        "float16": 989.4e12,
        "bfloat16": 989.4e12,
        "float8": 1978.9e12,
        "int8": 1978.9e12,
    },
    sparse_24={"tf32": 989.4e12, "float16": 1978.9e12, "bfloat16": 1978.9e12, "float8": 3957.8e12, "int8": 3957.8e12},
    bandwidth=3.35e12,
    cache_bytes=50 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
    launch_seconds=3e-6,
    features=frozenset({"mma", "cp_async", "wgmma", "tma", "fp8", "sparse_24"}),
    efficiency={
        "linear": 0.6,
        "conv": 0.45,
        "attention": 0.4,
        "norm": 0.5,
        "elementwise": 0.5,
        "quantize": 0.5,
        "other": 0.25,
        "memory": 0.85,
    },
)
