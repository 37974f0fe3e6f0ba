"""NVIDIA GeForce RTX 3090, 24 GB."""

from fxopt.ir.target import Target

TARGET = Target(
    name="rtx3090",
    kind="cuda",
    arch="sm_86",
    backend="triton",
    source=(
        "NVIDIA Ampere GA102 GPU architecture white paper (dense rates, float32 sums); "
        "launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float32": 35.6e12,
        "tf32": 35.6e12,
        "float16": 71.2e12,
        "bfloat16": 71.2e12,
        "int8": 284.7e12,
        "int4": 569.4e12,
    },
    sparse_24={"tf32": 71.2e12, "float16": 142.4e12, "bfloat16": 142.4e12, "int8": 569.4e12, "int4": 1138.8e12},
    bandwidth=0.936e12,
    cache_bytes=6 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
    launch_seconds=3e-6,
    features=frozenset({"mma", "cp_async", "sparse_24"}),
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
