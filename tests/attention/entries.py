"""What an entry of the corpus is: a model, and what must be found in it, or the reason why nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Dynamic = dict[str, dict[int, str]] | None


@dataclass(frozen=True)
class Expected:
    """The fields of a view; `fused` False: it is recognised, and left as it is for `reason`.

    `rotary` says of q and k how many features are turned (0: none); `zero_rows` what queries without keys give.
    """

    mask: str = "none"
    scale: float | None = 1.0
    groups: int = 1
    softcap: float = 0.0
    sink: bool = False
    rotary: tuple[int, int] = (0, 0)
    zero_rows: bool = False
    fused: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Entry:
    """A function of tensors (or a module), its inputs, and what is expected: views, or reasons, in order.

    `dynamic` names dynamic axes by the position of the input. `only` restricts the graphs it is tried on.
    """

    name: str
    model: Callable[..., Any]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    expected: tuple[Expected | str, ...]
    dynamic: dict[int, dict[int, str]] = field(default_factory=dict)
    only: tuple[str, ...] = ("torch", "dynamo", "script")

    def module(self) -> nn.Module:
        """The model in evaluation mode."""
        torch.manual_seed(0)
        made = self.model if isinstance(self.model, nn.Module) else Call(self.model)
        return made.eval()

    def sample(self) -> tuple[torch.Tensor, ...]:
        """The inputs, the same each time."""
        torch.manual_seed(1)
        return self.inputs()


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(*x)


B, H, L, S, D = 2, 4, 6, 6, 8
ROOT = 1 / math.sqrt(D)
LOWEST = torch.finfo(torch.float32).min


def heads(*shapes: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Normal numbers of these shapes; q, k and v [batch, heads, length, width] when there are none."""
    return lambda: tuple(torch.randn(shape) for shape in shapes or ((B, H, L, D),) * 3)


def with_mask(make: Callable[[], torch.Tensor], *shapes: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The same with one more input."""
    return lambda: (*heads(*shapes)(), make())
