"""From how many zero blocks on a block-sparse 8-bit product is faster than the dense one: measured break-evens.

From `python -m benchmarks.sparse_int8` (results/sparse_int8.json, "break_even"): shares of zero 4x1 blocks at which the
kernels of one x86 form take equally long for 64 rows, rounded up. More inputs need more zeros: the panel of 64 rows of
them leaves the first-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Set

# Instruction set -> (inputs up to, share of zero blocks).
_BREAK_EVEN = {
    "avx512_vnni": ((256, 0.1), (512, 0.15), (2048, 0.2), (math.inf, 0.25)),
    "avx_vnni": ((512, 0.3), (1024, 0.4), (math.inf, 0.55)),
    "avx2": ((math.inf, 0.1),),
}
_PANEL = 64  # rows that one pass over the weight serves
_NARROW, _NARROW_COST = 16, 0.55  # up to so many rows a pass takes this share of the time of a whole panel


def break_even(features: Set[str], inner: int, rows: int) -> float:
    """The least share of zero blocks with which the sparse product of `rows` rows is expected to be faster; 1: none.

    Args:
        features: the instruction sets of the CPU, AVX2 at least.
        inner: inputs of the weight.
    """
    wide = {"avx512bw", "avx512_vnni"} <= features
    name = "avx512_vnni" if wide else "avx_vnni" if "avx_vnni" in features else "avx2"
    share = next(share for most, share in _BREAK_EVEN[name] if inner <= most)
    panels, rest = divmod(rows, _PANEL)
    passes = panels + (0 if rest == 0 else _NARROW_COST if rest <= _NARROW else 1)
    used = rows / (_PANEL * passes) if passes else 1.0
    return 1 - (1 - share) * used
