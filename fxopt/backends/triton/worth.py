"""Does a kernel pay on a target? By prediction from its static report; every answer says that nothing was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxopt.backends.triton.chips import chip_of
from fxopt.backends.triton.configs import Choice, choice_of, linear_key, padded, pattern_key, splits_for
from fxopt.backends.triton.cost import Work, estimate
from fxopt.backends.triton.formats import COLUMNS, ROWS, SHIFT4, Layout, Packed, layout_for
from fxopt.backends.triton.ops.linear_packed import MOST_ROWS
from fxopt.cost_model.roofline import efficiency, peak
from fxopt.ir.target import Target

_LEAST = 0.95  # of the time of what it replaces
_SHARE = 0.9  # of the bandwidth
# Shares of the peak that attention reaches on an H100, in the best dense kernel and in one written in Triton: Shah et
# al., "FlashAttention-3" (2024).
_DENSE_ATTENTION, _TRITON_ATTENTION = 0.6, 0.4
_SPARSE_24 = 0.7  # of twice the dense rate: 1.4x, as PyTorch's tutorial on semi-structured sparsity measured on an A100
_LEAST_SPARSE_ROWS = 64
_LAUNCH = 2e-6  # seconds of a second launch


@dataclass(frozen=True)
class Comparison:
    """Predicted seconds of a kernel, and of what it replaces."""

    kernel: float
    plain: float
    bound: str

    @property
    def pays(self) -> bool:
        """By more than chance."""
        return self.kernel < _LEAST * self.plain

    def refusal(self, what: str, instead: str, target: Target) -> str:
        """ "" when the kernel pays, else why it does not."""
        if self.pays:
            return ""
        return (
            f"predicted not to pay on {target.name} (not measured): {what} takes {1e6 * self.kernel:.3g} us "
            f"({self.bound}), {instead} {1e6 * self.plain:.3g} us"
        )


def dense_linear(target: Target, rows: int, outputs: int, columns: int, element: torch.dtype) -> float:
    """Seconds of a product in 16-bit floats."""
    name = str(element).removeprefix("torch.")
    moved = 2.0 * (outputs * columns + rows * (outputs + columns))
    flops = 2.0 * rows * outputs * columns
    return max(moved / (target.bandwidth * _SHARE), flops / (peak(target, name) * efficiency(target, "linear", name)))


def packed_linear(
    target: Target, rows: int, outputs: int, columns: int, layout: Layout, group: int, element: torch.dtype
) -> Comparison | None:
    """A linear with packed weights against one in 16-bit floats; None when there is no kernel."""
    chip = chip_of(target)
    plain = dense_linear(target, rows, outputs, columns, element)
    packed = shape_of_packed(outputs, columns, layout, group, element)
    weights = packed.words.numel() * 4.0 + packed.scales.numel() * 2.0
    if rows > MOST_ROWS:
        unpacking = (weights + 2.0 * outputs * columns) / (target.bandwidth * _SHARE) + _LAUNCH
        return Comparison(plain + unpacking, plain, "the weight is dequantised first")
    choice = choice_of(chip, linear_key(packed, element, rows))
    if choice is None or choice.report is None:
        return None
    splits = splits_for(chip, choice, rows, packed)
    tiles = -(-columns // layout.tile)
    programs = -(-rows // choice["BM"]) * (packed.words.shape[1] // choice["BN"]) * splits
    parts = 8.0 * splits * rows * outputs if splits > 1 else 0.0
    moved = weights + 2.0 * rows * (outputs + columns) + parts
    adds = float(choice["BM"] * choice["BN"] * layout.tile)
    found = estimate(choice.report, chip, target, Work(programs, tiles / splits, adds, moved, choice.stages))
    return Comparison(found.seconds + (_LAUNCH if splits > 1 else 0.0), plain, found.bound)


def shape_of_packed(outputs: int, columns: int, layout: Layout, group: int, element: torch.dtype) -> Packed:
    """A packed weight without memory."""
    group = 0 if group >= columns else group
    tiles, rows = -(-columns // layout.tile), -(-outputs // ROWS) * ROWS

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    scales = meta(-(-tiles * layout.tile // group) if group else 1, rows, dtype=torch.float16)
    words = meta(tiles, rows, COLUMNS, dtype=torch.int32)
    return Packed(layout, words, scales, None, meta(rows, dtype=torch.float32), outputs, columns, group)


def nbits_refusal(
    target: Target, rows: int, outputs: int, columns: int, bits: int, group: int, element: torch.dtype
) -> str:
    """Why weights of so many bits do not pay at this size; "" when they do."""
    layout = layout_for(bits)
    found = None if layout is None else packed_linear(target, rows, outputs, columns, layout, group, element)
    if found is None:
        return f"no kernel for {bits}-bit weights on {target.name}"
    name = str(element).removeprefix("torch.")
    return found.refusal(f"a {bits}-bit weight of {outputs} x {columns} at {rows} rows", name, target)


def shift_refusal(target: Target, rows: int, outputs: int, columns: int, group: int, element: torch.dtype) -> str:
    """Why signs and exponents are no faster than 4-bit integers: tensor cores multiply at no cost."""
    ours = packed_linear(target, rows, outputs, columns, SHIFT4, group, element)
    integers = packed_linear(target, rows, outputs, columns, layout_for(4) or SHIFT4, group, element)
    if ours is None or integers is None:
        return f"no kernel for shift-add weights on {target.name}"
    return Comparison(ours.kernel, integers.kernel, ours.bound).refusal(
        f"a shift-add weight of {outputs} x {columns} at {rows} rows", "4-bit integers, with a smaller error,", target
    )


def sparse_24_refusal(target: Target, rows: int, outputs: int, columns: int, element: torch.dtype) -> str:
    """Why a 2:4 weight does not pay at this size; "" when it does."""
    name = str(element).removeprefix("torch.")
    if name not in target.sparse_24:
        return f"{target.name} lists no 2:4 rate of {name}"
    if rows < _LEAST_SPARSE_ROWS:
        return (
            f"2:4 products do not pay for fewer than {_LEAST_SPARSE_ROWS} rows ({rows}; not measured on {target.name})"
        )
    moved = 2.0 * (outputs * columns * 9 / 16 + rows * (outputs + columns))
    rate = target.sparse_24[name] * efficiency(target, "linear", name) * _SPARSE_24
    seconds = max(moved / (target.bandwidth * _SHARE), 2.0 * rows * outputs * columns / rate)
    plain = dense_linear(target, rows, outputs, columns, element)
    return Comparison(seconds, plain, "compute").refusal(f"2:4 of {outputs} x {columns} at {rows} rows", name, target)


def break_even_density(
    target: Target, heads: int, length: int, width: int, element: torch.dtype, renumbered: bool
) -> float:
    """The share of tiles below which pattern-sparse attention is predicted to be faster than dense; 0: never."""
    if pattern_choice(target, width, element, renumbered) is None:
        return 0.0
    dense = _least_attention(target, heads, length, width, element) / _DENSE_ATTENTION
    return _LEAST * dense / pattern_seconds(target, heads, length, width, element, renumbered)


def pattern_choice(target: Target, width: int, element: torch.dtype, renumbered: bool) -> Choice | None:
    """How the kernel of pattern-sparse attention is launched; None: there is none."""
    choice = choice_of(chip_of(target), pattern_key(element, width, renumbered))
    return None if choice is None or choice.report is None else choice


def pattern_seconds(
    target: Target, heads: int, length: int, width: int, element: torch.dtype, renumbered: bool
) -> float:
    """Predicted seconds of the kernel over all tiles; it must exist."""
    choice = pattern_choice(target, width, element, renumbered)
    assert choice is not None and choice.report is not None
    programs = heads * -(-length // choice["BQ"])
    adds = 2.0 * choice["BQ"] * choice["BK"] * padded(width)
    moved = 8.0 * heads * length * width
    work = Work(programs, length / choice["BK"], adds, moved, choice.stages)
    found = estimate(choice.report, chip_of(target), target, work).seconds
    return max(_least_attention(target, heads, length, width, element) / _TRITON_ATTENTION, found)


def _least_attention(target: Target, heads: int, length: int, width: int, element: torch.dtype) -> float:
    """Seconds of dense attention at the peak rate."""
    return 4.0 * heads * length * length * width / peak(target, str(element).removeprefix("torch."))


def density_refusal(
    target: Target, density: float, heads: int, length: int, width: int, element: torch.dtype, renumbered: bool = False
) -> str:
    """Why pattern-sparse attention of this density does not pay; "" when it does."""
    limit = break_even_density(target, heads, length, width, element, renumbered)
    if density <= limit and not math.isclose(limit, 0.0):
        return ""
    return (
        f"predicted not to pay on {target.name} (not measured): {density:.2f} of the tiles are looked at; dense "
        f"attention is as fast from {limit:.2f} on"
    )
