"""Arm Cortex-A53, four cores in order at 1.4 GHz (Raspberry Pi 3, many phones): no 8-bit dot product."""

from fxopt.cost_model.sparse_rates import measured_kernels
from fxopt.ir.target import Target

TARGET = Target(
    name="cortex-a53",
    kind="cpu",
    arch="aarch64",
    backend="tvm",
    source=(
        "peak: one 128-bit FMLA per cycle (Arm Cortex-A53 Technical Reference Manual: one 128-bit Advanced SIMD "
        "datapath) at 1.4 GHz, 8-bit products as SMLAL and SADALP at twice that; cache sizes of the BCM2837; "
        "bandwidths and launch time are assumptions, efficiency factors were fitted"
    ),
    error=(
        "predicted from instruction counts, never measured on the device: 41 % mean error on held-out rows of "
        "counts, 4 % on whole models (benchmarks/compiled_rates.py)"
    ),
    interval=0.7,
    peak={"float32": 11.2e9, "int8": 22.4e9},
    bandwidth=2.2e9,
    cache_bytes=512 * 2**10,
    cache_bandwidth=6e9,
    launch_seconds=0.3e-6,
    cores=4,
    cpu="cortex-a53",
    features=frozenset({"neon"}),
    sparse_kernels=measured_kernels("cortex-a53"),
    efficiency={
        "linear": 0.65,
        "linear.int8": 0.34,
        "conv": 0.67,
        "conv.int8": 0.29,
        "conv.narrow": 0.55,
        "conv.narrow.int8": 0.21,
        "attention": 0.43,
        "norm": 0.6,
        "elementwise": 0.27,
        "quantize": 0.1,
        "other": 0.3,
        "memory": 1.0,
        "parallel": 0.9,
    },
)
