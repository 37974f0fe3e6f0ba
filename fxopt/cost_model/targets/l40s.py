"""NVIDIA L40S, 48 GB."""

from fxopt.ir.target import Target

TARGET = Target(
    name="l40s",
    kind="cuda",
    arch="sm_89",
    backend="triton",
    source=(
        "NVIDIA L40S data sheet (half of the rates stated with sparsity); L2 size as the Ada white paper's AD102; "
        "launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float32": 91.6e12,
        "tf32": 183e12,
        "float16": 362e12,
        "bfloat16": 362e12,
        "float8": 733e12,
        "int8": 733e12,
    },
    sparse_24={"tf32": 366e12, "float16": 724e12, "bfloat16": 724e12, "float8": 1466e12, "int8": 1466e12},
    bandwidth=0.864e12,
    cache_bytes=96 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
    launch_seconds=3e-6,
    features=frozenset({"mma", "cp_async", "fp8", "sparse_24"}),
    efficiency={
        "linear": 0.6,
        "conv": 0.5,
        "attention": 0.5,
        "norm": 0.5,
        "elementwise": 0.5,
        "quantize": 0.5,
        "other": 0.25,
        "memory": 0.85,
    },
)
