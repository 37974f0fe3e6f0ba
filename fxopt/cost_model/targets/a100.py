"""NVIDIA A100 SXM4, 80 GB."""

from fxopt.cost_model.sparse_kernels import AMPERE_24
from fxopt.ir.target import Target

TARGET = Target(
    name="a100",
    kind="cuda",
    arch="sm_80",
    backend="triton",
    source=(
        "NVIDIA A100 Tensor Core GPU data sheet (SXM4 80 GB, dense rates) and the Ampere white paper (L2 size); "
        "launch time and efficiency factors are assumptions"
    ),
    error="never measured",
    interval=0.5,
    peak={
        "float64": 9.7e12,
        "float32": 19.5e12,
        "tf32": 156e12,
        "float16": 312e12,
        "bfloat16": 312e12,
        "int8": 624e12,
        "int4": 1248e12,
    },
    sparse_24={"tf32": 312e12, "float16": 624e12, "bfloat16": 624e12, "int8": 1248e12, "int4": 2496e12},
    sparse_kernels=AMPERE_24,
    bandwidth=2.039e12,
    cache_bytes=40 * 2**20,  # no bandwidth of the L2 is stated: everything is priced as main memory
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
