"""Arm Cortex-A76 at 2.4 GHz, one core: with the 8-bit dot product."""

from fxopt.cost_model.sparse_rates import measured_kernels
from fxopt.ir.target import Target

TARGET = Target(
    name="cortex-a76",
    kind="cpu",
    arch="aarch64",
    backend="tvm",
    source=(
        "peak: two 128-bit FMLA and two 128-bit SDOT per cycle (Arm Cortex-A76 Software Optimization Guide) at 2.4 "
        "GHz; bandwidths and launch time are assumptions, efficiency factors were fitted"
    ),
    error=(
        "predicted from instruction counts, never measured on the device: 21 % mean error on held-out rows of "
        "counts, 3 % on whole models (benchmarks/compiled_rates.py)"
    ),
    interval=0.7,
    peak={"float32": 38.4e9, "int8": 153.6e9},
    bandwidth=8e9,
    cache_bytes=2 * 2**20,
    cache_bandwidth=25e9,
    launch_seconds=0.1e-6,
    cpu="cortex-a76",
    features=frozenset({"neon", "dotprod"}),
    sparse_kernels=measured_kernels("cortex-a76"),
    efficiency={
        "linear": 0.67,
        "linear.int8": 0.92,
        "conv": 0.73,
        "conv.int8": 0.39,
        "conv.narrow": 0.59,
        "conv.narrow.int8": 0.22,
        "attention": 0.5,
        "norm": 0.55,
        "elementwise": 0.19,
        "quantize": 0.1,
        "other": 0.3,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
