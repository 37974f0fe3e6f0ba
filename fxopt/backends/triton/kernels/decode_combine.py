"""The splits of `decode_attention` put together: each is rescaled to the largest maximum."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["SPLITS"])
def decode_combine(OUT, STATS, Y, SPLITS, ALL, D: tl.constexpr, D2: tl.constexpr):
    """Program: a row of ALL rows, batch * heads * queries; Y [ALL, D]. A row that sees no key gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D2)
    largest = tl.load(STATS + row)
    for split in range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(STATS + split * ALL + row))
    acc = tl.zeros((D2,), tl.float32)
    total = largest * 0.0
    for split in range(SPLITS):
        at = split * ALL + row
        weight = tl.exp2(tl.load(STATS + at) - largest)
        total += tl.load(STATS + SPLITS * ALL + at) * weight
        acc += tl.load(OUT + at * D + d, mask=d < D, other=0.0) * weight
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(Y + row * D + d, acc.to(Y.dtype.element_ty), mask=d < D)
