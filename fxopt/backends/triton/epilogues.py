"""What may follow a linear in its kernel, by name; the numbers are those of `kernels/epilogue.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidOption

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
COMBINATIONS = ("", "add", "mul")


@dataclass(frozen=True)
class Epilogue:
    """y -> activation(y + bias) combined with a second operand of the result's shape.

    Raises:
        InvalidOption: a name is unknown, or a combination and its operand do not come together.
    """

    bias: Tensor | None = None
    other: Tensor | None = None
    activation: str = ""
    combine: str = ""

    def __post_init__(self) -> None:
        names = ((ACTIVATIONS, self.activation, "activation"), (COMBINATIONS, self.combine, "combine"))
        for known, name, what in names:
            if name not in known:
                raise InvalidOption(f"{what}={name!r}; expected one of {known}")
        if bool(self.combine) != (self.other is not None):
            given = "without" if self.other is None else "with"
            raise InvalidOption(f"combine={self.combine!r} {given} a second operand")

    def constants(self) -> dict[str, Any]:
        """The kernel's constants."""
        return {
            "HAS_BIAS": self.bias is not None,
            "ACT": ACTIVATIONS.index(self.activation),
            "COMBINE": COMBINATIONS.index(self.combine),
        }

    def operands(self, instead: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel's pointers to bias and second operand; `instead` stands for what is not read."""
        return (instead if self.bias is None else self.bias, instead if self.other is None else self.other)

    def apply(self, y: Tensor) -> Tensor:
        """The definition, on values to which no bias was added yet."""
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.activation == "relu":
            y = y.relu()
        elif self.activation == "silu":
            y = torch.nn.functional.silu(y)
        elif self.activation:
            y = torch.nn.functional.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        if self.other is not None:
            other = self.other.to(y.dtype).reshape(y.shape)
            y = y + other if self.combine == "add" else y * other
        return y

    def flat(self, rows: int, columns: int) -> Epilogue:
        """The same with a second operand [rows, columns] that is contiguous."""
        other = None if self.other is None else self.other.reshape(rows, columns).contiguous()
        return Epilogue(self.bias, other, self.activation, self.combine)
