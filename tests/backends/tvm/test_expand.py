"""Operators written in others: what torch cannot decompose says why, and errors of ours are not taken for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported
from fxopt.frontends.torch_export import load
from tests.backends.tvm import harness

from fxopt.backends.tvm import Tvm, expand  # isort: skip

__all__ = ["harness"]
X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compiled(function: Callable[[Tensor], Tensor]) -> Any:
    return Tvm().compile(load(Function(function).eval(), (X,)), get_target("wasm-simd"))


def test_the_failure_of_a_decomposition_is_in_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("Cannot decompose lgamma\nnor anything like it")

    monkeypatch.setattr(expand, "_table", lambda: {torch.ops.aten.lgamma.default: fails})
    with pytest.raises(Unsupported, match="lgamma.default has no kernel; torch cannot decompose it: Cannot decompose lgamma$"):
        compiled(torch.lgamma)


def test_an_error_that_is_not_of_torch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Any) -> Tensor:
        return x.no_such_thing

    monkeypatch.setattr(expand, "_table", lambda: {torch.ops.aten.lgamma.default: wrong})
    with pytest.raises(AttributeError, match="no_such_thing"):
        compiled(torch.lgamma)


@pytest.mark.slow
def test_decompositions_may_change_the_lists_they_are_given() -> None:
    rows = torch.tensor([0, 5, 5])

    def picked(x: Tensor) -> Tensor:
        return torch.ops.aten._unsafe_masked_index(x, (rows > 3)[:, None], [None, rows, None], 0.5)

    (found,) = compiled(picked).run([X])
    assert torch.equal(found, picked(X))
