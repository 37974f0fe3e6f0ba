"""Packed words to planes of 16-bit floats: in inline assembly, and plainly for the interpreter.

Each function is defined twice, with the same values; `ptx.py` has the texts, and its tests prove them equal.
"""

import triton
import triton.language as tl

from fxopt.backends.triton import ptx
from fxopt.backends.triton.kernels.common import INTERPRETED

if INTERPRETED:

    @triton.jit
    def _integer(p, PLANE: tl.constexpr, BITS: tl.constexpr, ELEMENT: tl.constexpr):
        code = (p >> (BITS * PLANE)) & ((1 << BITS) - 1)
        return (code.to(tl.float32) - (1 << (BITS - 1))).to(ELEMENT)

    @triton.jit
    def _power(p, PLANE: tl.constexpr, ELEMENT: tl.constexpr):
        code = (p >> (4 * PLANE)) & 15
        magnitude = tl.where((code & 7) != 0, tl.exp2((code & 7).to(tl.float32) - 15.0), 0.0)
        return tl.where((code & 8) != 0, -magnitude, magnitude).to(ELEMENT)

    @triton.jit
    def planes4(p, IS_SHIFT: tl.constexpr, ELEMENT: tl.constexpr):
        """The eight planes of 4-bit codes."""
        if IS_SHIFT:
            return (_power(p, 0, ELEMENT), _power(p, 1, ELEMENT), _power(p, 2, ELEMENT),
                    _power(p, 3, ELEMENT), _power(p, 4, ELEMENT), _power(p, 5, ELEMENT),
                    _power(p, 6, ELEMENT), _power(p, 7, ELEMENT))  # fmt: skip
        else:
            return (_integer(p, 0, 4, ELEMENT), _integer(p, 1, 4, ELEMENT), _integer(p, 2, 4, ELEMENT),
                    _integer(p, 3, 4, ELEMENT), _integer(p, 4, 4, ELEMENT), _integer(p, 5, 4, ELEMENT),
                    _integer(p, 6, 4, ELEMENT), _integer(p, 7, 4, ELEMENT))  # fmt: skip

    @triton.jit
    def planes2(p, ELEMENT: tl.constexpr):
        """The sixteen planes of 2-bit codes."""
        return (_integer(p, 0, 2, ELEMENT), _integer(p, 1, 2, ELEMENT), _integer(p, 2, 2, ELEMENT),
                _integer(p, 3, 2, ELEMENT), _integer(p, 4, 2, ELEMENT), _integer(p, 5, 2, ELEMENT),
                _integer(p, 6, 2, ELEMENT), _integer(p, 7, 2, ELEMENT), _integer(p, 8, 2, ELEMENT),
                _integer(p, 9, 2, ELEMENT), _integer(p, 10, 2, ELEMENT), _integer(p, 11, 2, ELEMENT),
                _integer(p, 12, 2, ELEMENT), _integer(p, 13, 2, ELEMENT), _integer(p, 14, 2, ELEMENT),
                _integer(p, 15, 2, ELEMENT))  # fmt: skip

    @triton.jit
    def _times(w, s, z, HAS_OFFSET: tl.constexpr):
        value = w.to(tl.float32) * s.to(tl.float32)
        return (value + z.to(tl.float32) if HAS_OFFSET else value).to(w.dtype)

else:
    _INT4_FP16, _INT4_BF16 = tl.constexpr(ptx.integers("fp16", 4)), tl.constexpr(ptx.integers("bf16", 4))
    _INT2_FP16, _INT2_BF16 = tl.constexpr(ptx.integers("fp16", 2)), tl.constexpr(ptx.integers("bf16", 2))
    _SHIFT_FP16, _SHIFT_BF16 = tl.constexpr(ptx.shift4("fp16")), tl.constexpr(ptx.shift4("bf16"))
    _SCALED_FP16, _SCALED_BF16 = tl.constexpr(ptx.scaled("fp16", False)), tl.constexpr(ptx.scaled("bf16", False))
    _OFFSET_FP16, _OFFSET_BF16 = tl.constexpr(ptx.scaled("fp16", True)), tl.constexpr(ptx.scaled("bf16", True))
    _EIGHT, _SIXTEEN = tl.constexpr(ptx.constraints(8, 2)), tl.constexpr(ptx.constraints(16, 2))
    _PAIR, _TRIPLE = tl.constexpr(ptx.constraints(1, 2)), tl.constexpr(ptx.constraints(1, 3))
    _EIGHT_FP16, _EIGHT_BF16 = tl.constexpr((tl.float16,) * 8), tl.constexpr((tl.bfloat16,) * 8)
    _SIXTEEN_FP16, _SIXTEEN_BF16 = tl.constexpr((tl.float16,) * 16), tl.constexpr((tl.bfloat16,) * 16)

    @triton.jit
    def planes4(p, IS_SHIFT: tl.constexpr, ELEMENT: tl.constexpr):
        """The eight planes of 4-bit codes."""
        if ELEMENT == tl.float16:
            text: tl.constexpr = _SHIFT_FP16 if IS_SHIFT else _INT4_FP16
            types: tl.constexpr = _EIGHT_FP16
        else:
            text: tl.constexpr = _SHIFT_BF16 if IS_SHIFT else _INT4_BF16
            types: tl.constexpr = _EIGHT_BF16
        return tl.inline_asm_elementwise(asm=text, constraints=_EIGHT, args=[p], dtype=types, is_pure=True, pack=2)

    @triton.jit
    def planes2(p, ELEMENT: tl.constexpr):
        """The sixteen planes of 2-bit codes."""
        text: tl.constexpr = _INT2_FP16 if ELEMENT == tl.float16 else _INT2_BF16
        types: tl.constexpr = _SIXTEEN_FP16 if ELEMENT == tl.float16 else _SIXTEEN_BF16
        return tl.inline_asm_elementwise(asm=text, constraints=_SIXTEEN, args=[p], dtype=types, is_pure=True, pack=2)

    @triton.jit
    def _times(w, s, z, HAS_OFFSET: tl.constexpr):
        if HAS_OFFSET:
            text: tl.constexpr = _OFFSET_FP16 if w.dtype == tl.float16 else _OFFSET_BF16
            return tl.inline_asm_elementwise(
                asm=text, constraints=_TRIPLE, args=[w, s, z], dtype=w.dtype, is_pure=True, pack=2
            )
        else:
            text: tl.constexpr = _SCALED_FP16 if w.dtype == tl.float16 else _SCALED_BF16
            return tl.inline_asm_elementwise(
                asm=text, constraints=_PAIR, args=[w, s], dtype=w.dtype, is_pure=True, pack=2
            )


@triton.jit
def group_row(t, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The first group of tile t; GROUP inputs have a scale, 0: all. In a tile, GROUP divides it."""
    if GROUP == 0:
        return t * 0
    elif GROUP < TILE:
        return t * (TILE // GROUP)
    else:
        return t // (GROUP // TILE)


@triton.jit
def scaled(w, S, Z, row, NP, PLANE: tl.constexpr, GROUP: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """A plane [rows, 16] times the scales of its group, plus its offsets; `row`: where those of the first group are."""
    if GROUP > 0:
        row += (PLANE * 16 // GROUP) * NP
    scale = tl.load(S + row)[:, None]
    offset = tl.load(Z + row)[:, None] if HAS_OFFSET else scale
    return _times(w, scale, offset, HAS_OFFSET)


@triton.jit
def joined(w0, w1, w2, w3, w4, w5, w6, w7):
    """Eight planes [rows, 16] side by side, [rows, 128]."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    w = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    return tl.reshape(w, (w0.shape[0], 128))
