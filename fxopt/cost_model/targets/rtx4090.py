"""NVIDIA GeForce RTX 4090, 24 GB."""

from fxopt.ir.target import Target

TARGET = Target(
    name="rtx4090",
    kind="cuda",
    arch="sm_89",
    backend="triton",
    source=(
        "NVIDIA Ada GPU architecture white paper (dense rates, float32 sums); "
        "launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float32": 82.6e12,
        "tf32": 82.6e12,
        "float16": 165.2e12,
        "bfloat16": 165.2e12,
        "float8": 330.3e12,
        "int8": 660.6e12,
    },
    sparse_24={"tf32": 165.2e12, "float16": 330.4e12, "bfloat16": 330.4e12, "float8": 660.6e12, "int8": 1321.2e12},
    bandwidth=1.008e12,
    cache_bytes=72 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
    launch_seconds=3e-6,
    features=frozenset({"mma", "cp_async", "fp8", "sparse_24"}),
    efficiency={
        "linear": 0.65,
        "conv": 0.5,
        "attention": 0.5,
        "norm": 0.5,
        "elementwise": 0.5,
        "quantize": 0.5,
        "other": 0.25,
        "memory": 0.85,
    },
)
