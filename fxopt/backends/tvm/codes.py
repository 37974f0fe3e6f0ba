"""Tensors of 8-bit codes: which values codes stand for, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.backends.tvm.values import Value


@dataclass(frozen=True)
class Format:
    """How codes are stored: `q - offset` in `dtype`; an offset of None is the zero point."""

    dtype: str
    offset: int | None

    def shift(self, zero: int) -> int:
        """What is subtracted from a code."""
        return zero if self.offset is None else self.offset


BYTES, SIGNED, WIDE = Format("byte", 0), Format("int8", 128), Format("int16", None)


@dataclass(frozen=True)
class Levels:
    """The values scale * (0 - zero ... 255 - zero), and how their codes are stored."""

    scale: float
    zero: int
    stored: Format

    @property
    def shift(self) -> int:
        """What is subtracted from a code."""
        return self.stored.shift(self.zero)


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor on levels: `value` holds the stored codes."""

    value: Value
    levels: Levels
