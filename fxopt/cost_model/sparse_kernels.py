"""Kernels that skip zeros of weights: for which patterns, and how much faster than dense ones they are.

Targets list the kernels that run on them. Those of compiled code are in `sparse_rates`.
"""

from __future__ import annotations

from fxopt.ir.target import SparseKernel

# Blocks of 4 outputs in 8 bits on x86 with AVX-512 VNNI, against our own dense kernels: the least favourable of four
# products of 384 to 3072 inputs and 64 rows, with GELU, layer norm or neither. Larger blocks are several of these.
_SPEEDUPS = ((0.3, 1.18), (0.5, 1.56), (0.7, 2.55), (0.8, 3.57), (0.9, 5.35))
_MEASURED = "benchmarks/sparse_int8.py on one thread of an AMD EPYC, Zen 5"
OWN_INT8 = tuple(
    SparseKernel(pattern, "int8", _SPEEDUPS, least_rows=64, custom_ops=True, source=_MEASURED)
    for pattern in ("4x1", "8x1", "16x1")
)

# Published: 1.38 for 3072 rows, 10240 inputs and 3072 outputs in float16 (PyTorch's tutorial on 2:4 sparsity, CUTLASS).
# At a batch of 1 the same product is slower than the dense one (PyTorch issue 111339), between them nothing is known.
AMPERE_24 = tuple(
    SparseKernel("2:4", dtype, ((0.5, 1.38),), least_rows=3072, source="PyTorch's tutorial on 2:4 sparsity, A100")
    for dtype in ("float16", "bfloat16")
)
