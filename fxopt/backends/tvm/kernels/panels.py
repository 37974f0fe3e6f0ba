"""y = act(x @ W.T + b) with W in fewer bytes: each panel of outputs is decoded once for a block of rows, then dense.

Compact storage, dense speed: decoding in the innermost loop would cost more than it saves. Three forms of W:

- powers of two (Miyashita et al., 2016): a byte with the sign and the exponent; shifting instead of multiplying is
  slower on every processor that multiplies vectors;
- two of every four inputs, chosen for each output alone (Mishra et al., 2021): the values, and a byte with both places;
- codes of 2, 4 or 8 bits in groups along the input, with a scale and a zero point each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel, cast, float32, int32, reinterpret, spread, typed
from fxopt.backends.tvm.kernels.activations import Activation
from fxopt.backends.tvm.kernels.tiles import RowMajor, Step, emit_rows
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

Floats = npt.NDArray[np.float32]
Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Panels:
    """A stored form; `per_byte` codes of neighbouring inputs share a byte, `group` inputs a scale."""

    kind: Literal["powers", "two_of_four", "codes"]
    exponent: int = 0  # of the largest power of two
    per_byte: int = 1
    group: int = 0


def panel_dense(
    name: str, rows: int, inner: int, outputs: int, form: Panels, machine: Machine, activation: Activation = ""
) -> Any:
    """`void NAME(x [rows, inner], the stored arrays, bias, scratch, y [rows, outputs])`; see `scratch_size`."""
    size = RowMajor(rows, inner, outputs, machine.columns, activation)
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * inner)
    steps = -(-inner // _inputs(form))
    stored = [kernel.buffer(f"w{i}", size.panels * count * size.width, dtype)
              for i, (dtype, count) in enumerate(_arrays(form, inner))]  # fmt: skip
    bias = kernel.buffer("bias", size.panels * size.width)
    scratch = kernel.buffer("scratch", scratch_size(form, inner, machine))
    y = kernel.buffer("y", rows * outputs)
    lanes, width = machine.lanes, size.width

    def decode(panel: Expr) -> None:
        with kernel.loop(steps, "s") as s:
            for v in range(0, width, lanes):
                for i, value in enumerate(_decoded(kernel, form, stored, panel, s, v, inner, width, lanes)):
                    kernel.store(scratch, (s * _inputs(form) + i) * width + v, value, lanes)

    def walk(_: Expr) -> tuple[Expr, Step]:
        return inner, lambda p: [(p, p * width)]

    emit_rows(kernel, size, machine, (x, scratch, bias, y), [walk], decode)
    return kernel.function()


def scratch_size(form: Panels, inner: int, machine: Machine) -> int:
    """Floats of a decoded panel."""
    each = _inputs(form)
    return -(-inner // each) * each * machine.columns


def _inputs(form: Panels) -> int:
    """Inputs that are decoded together."""
    return 4 if form.kind == "two_of_four" else form.per_byte


def _arrays(form: Panels, inner: int) -> list[tuple[str, int]]:
    """Types and values per output of what is stored."""
    steps = -(-inner // _inputs(form))
    if form.kind == "powers":
        return [("uint8", steps)]
    if form.kind == "two_of_four":
        return [("float32", 2 * steps), ("uint8", steps)]
    groups = -(-inner // form.group)
    return [("uint8", steps), ("float32", groups), ("float32", groups)]


def _decoded(
    kernel: Kernel,
    form: Panels,
    stored: Sequence[Any],
    panel: Expr,
    s: Expr,
    v: int,
    inner: int,
    width: int,
    lanes: int,
) -> list[Expr]:
    """The weights of the inputs of a step, for `lanes` outputs."""
    ints, floats = typed("int32", lanes), typed("float32", lanes)
    steps = -(-inner // _inputs(form))

    def number(value: int) -> Expr:
        return spread(int32(value), lanes)

    def bytes_of(buffer: Any) -> Expr:
        return kernel.let(cast(ints, kernel.load(buffer, (panel * steps + s) * width + v, lanes)))

    if form.kind == "powers":
        code = bytes_of(stored[0])
        bits = ((code & number(0x80)) << number(24)) | ((code & number(0x7F)) << number(23))
        return [reinterpret(floats, bits) * float32(2.0**form.exponent, lanes)]
    if form.kind == "two_of_four":
        first, second = (
            kernel.let(kernel.load(stored[0], ((panel * steps + s) * 2 + i) * width + v, lanes)) for i in (0, 1)
        )
        places = bytes_of(stored[1])
        one, two = kernel.let(places & number(3)), kernel.let(places >> number(2))
        zero = float32(0.0, lanes)
        return [
            tirx.Select(tirx.EQ(one, number(q)), first, tirx.Select(tirx.EQ(two, number(q)), second, zero))
            for q in range(4)
        ]
    codes, bits = bytes_of(stored[0]), 8 // form.per_byte
    values = []
    for i in range(form.per_byte):
        group = tirx.floordiv(s * form.per_byte + i, int32(form.group))
        at = (panel * -(-inner // form.group) + group) * width + v
        code = (codes >> number(bits * i)) & number((1 << bits) - 1)
        values.append((cast(floats, code) - kernel.load(stored[2], at, lanes)) * kernel.load(stored[1], at, lanes))
    return values


# ---- packing


def pack_powers(weight: Floats, width: int) -> tuple[Panels, Arrays] | None:
    """The form of a weight [out, in] of zeros and powers of two; None for any other."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    exponents = ((bits >> 23) & 0xFF).astype(np.int64)
    used = bits << 1 != 0
    if (bits & 0x7FFFFF).any() or not used.any() or exponents[used].min() < 1 or exponents[used].max() > 253:
        return None
    highest = int(exponents[used].max())
    if highest - int(exponents[used].min()) > 126:
        return None
    codes = np.where(used, exponents - highest + 127, 0) | np.where(bits >> 31, 0x80, 0)
    return Panels("powers", exponent=highest - 127), [_panels(codes.astype(np.uint8), width)]


def pack_two_of_four(weight: Floats, width: int) -> tuple[Panels, Arrays] | None:
    """The form of a weight [out, in] with two values at most in every four inputs; None for any other."""
    outputs, inner = weight.shape
    if inner % 4:
        return None
    groups = weight.reshape(outputs, -1, 4)
    if int((groups != 0).sum(-1).max(initial=0)) > 2:
        return None
    chosen = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :2], axis=-1)
    values = np.take_along_axis(groups, chosen, -1).reshape(outputs, -1)
    places = (chosen[..., 0] | chosen[..., 1] << 2).astype(np.uint8)
    return Panels("two_of_four"), [_panels(values, width), _panels(places, width)]


def pack_bits(
    codes: npt.NDArray[np.uint8], scales: Floats, zeros: Floats, bits: int, group: int, width: int
) -> tuple[Panels, Arrays]:
    """The form of codes [out, in] of 2 to 8 bits, with scales and zero points [out, groups]."""
    per_byte = 8 // (2 if bits <= 2 else 4 if bits <= 4 else 8)
    outputs, inner = codes.shape
    whole = np.zeros((outputs, -(-inner // per_byte) * per_byte), np.uint8)
    whole[:, :inner] = codes
    parts = whole.reshape(outputs, -1, per_byte)
    stored = np.zeros(parts.shape[:2], np.uint8)
    for i in range(per_byte):
        stored |= (parts[..., i] << (8 // per_byte * i)).astype(np.uint8)
    arrays = [_panels(array, width) for array in (stored, scales.astype(np.float32), zeros.astype(np.float32))]
    return Panels("codes", per_byte=per_byte, group=group), arrays


def _panels(values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """[out, n] -> [panels, n, width], zero padded."""
    outputs, count = values.shape
    padded = np.zeros((-(-outputs // width) * width, count), values.dtype)
    padded[:outputs] = values
    return np.ascontiguousarray(padded.reshape(-1, width, count).transpose(0, 2, 1))


__all__ = ["Panels", "pack_bits", "pack_powers", "pack_two_of_four", "panel_dense", "scratch_size"]
