"""Where values live while a model runs: slots of memory, and strided views of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Place = Literal["arena", "input", "output", "constant"]

# torch's element types -> TVM's; truth values are bytes that are 0 or 1.
DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "uint8"}
TYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)  # as messages name them
BYTES = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "byte": 1}


def tvm_type(dtype: str) -> str:
    """TVM's element type; "byte" is one of 0 ... 255, while "uint8" is a truth value."""
    return "uint8" if dtype == "byte" else dtype


@dataclass(eq=False)
class Slot:
    """A piece of memory; `index` counts inputs, outputs or constants, `offset` is set by the memory plan."""

    place: Place
    count: int
    dtype: str
    index: int = 0
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in a slot: element (i, j, ...) lies at offset + i * strides[0] + j * strides[1] + ..."""

    slot: Slot
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """TVM's name of the element type."""
        return self.slot.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in order, from the slot's start."""
        return self.offset == 0 and is_dense(self.shape, self.strides) and self.slot.count == self.count

    def viewed(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Value:
        """The same memory under another shape."""
        return Value(self.slot, shape, strides, self.offset + offset)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are those of a contiguous tensor; axes of size 1 do not matter."""
    expected = row_major(shape)
    return math.prod(shape) == 0 or all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, strides, expected, strict=True)
    )
