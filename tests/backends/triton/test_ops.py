"""The operators without kernels: schema, fake rule and reference agree; a kernel that fails is replaced for its shapes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.backends.triton import launch as launching
from fxopt.backends.triton.chips import chip_of_arch
from fxopt.backends.triton.epilogues import Epilogue
from fxopt.backends.triton.executable import placed
from fxopt.backends.triton.launch import launch, recorded
from fxopt.backends.triton.ops.linear_packed import linear_packed
from fxopt.backends.triton.ops.linear_sparse24 import linear_sparse24, packed
from fxopt.backends.triton.ops.registry import KernelOp, contiguous_rows
from fxopt.errors import InvalidOption, Unsupported
from tests.backends.triton.cases import Case, all_cases

CASES = [case for case in all_cases() if "2 ** 31" not in case.name and "dequantised" not in case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_references(case: Case) -> None:
    found = case.operator(*case.arguments)
    results = list(found) if isinstance(found, tuple) else [found]
    for result, truth in zip(results, case.truth, strict=True):
        assert result.shape == truth.shape
        assert float((result.double() - truth).norm()) <= case.room * float(truth.norm()) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4 odd sizes, silu, mul", "w8a8 odd sizes", "range", "decode", "patterns, one token", "qkv, norm, rotary"])
def test_torch_accepts_them(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    torch.library.opcheck(case.operator.target, case.arguments)


@pytest.mark.slow
def test_torch_accepts_sparse_weights() -> None:
    weight = torch.randn(32, 16, 4)
    weight[..., ::2] = 0
    values, places = packed(weight.reshape(32, 64).half())
    torch.library.opcheck(linear_sparse24.target, (torch.randn(3, 64).half(), values, places, None))


def failing(error: Exception) -> tuple[KernelOp[...], list[Tensor]]:
    calls: list[Tensor] = []

    def kernels(x: Tensor) -> Tensor:
        calls.append(x)
        raise error

    found: Any = KernelOp.__new__(KernelOp)
    found.name, found.reference, found.kernels, found.disabled = "doubled", lambda x: 2 * x, kernels, set()
    return found, calls


class Compilation(Exception):
    """As Triton's."""


Compilation.__module__ = "triton.compiler.errors"


@pytest.mark.parametrize("error", [Unsupported("w4a16 spills registers"), Compilation("no")])
def test_a_kernel_that_fails_is_disabled_for_its_shapes(error: Exception) -> None:
    operator, calls = failing(error)
    with pytest.warns(UserWarning, match=f"doubled runs in the reference: {error}"):
        assert operator.on_cuda(torch.ones(2)).tolist() == [2.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operator.on_cuda(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == 1
    with pytest.warns(UserWarning, match="runs in the reference"):
        operator.on_cuda(torch.ones(3))


def test_other_errors_are_errors() -> None:
    operator, _ = failing(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        operator.on_cuda(torch.ones(2))
    assert not operator.disabled


class Kernel:
    """Something that is launched."""

    __name__ = "k"

    def __init__(self, spills: int = 0) -> None:
        self.spills, self.launches = spills, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.launches += 1
            return SimpleNamespace(n_spills=self.spills)

        return run


def test_launches() -> None:
    kernel = Kernel()
    launch(kernel, (1, 0), (), {}, 4, 3)
    assert kernel.launches == 0
    launch(kernel, (1,), (), {}, 4, 3)
    assert kernel.launches == 1
    with recorded(chip_of_arch(80, 1, 1.0)) as launches:
        launch(kernel, (1,), (torch.ones(1),), {"BM": 16}, 4, 3)
    assert kernel.launches == 1 and str(launches[0]) == "k[BM=16 warps=4 stages=3]"
    assert launching._RECORD.get() is None
    with pytest.raises(Unsupported, match=r"k\[BM=16 warps=4 stages=3\] spills registers"):
        launch(Kernel(spills=4), (1,), (), {"BM": 16}, 4, 3)


def test_epilogues_ask_for_their_operands() -> None:
    with pytest.raises(InvalidOption, match="activation='tanh'; expected one of"):
        Epilogue(activation="tanh")
    with pytest.raises(InvalidOption, match="combine='add' without a second operand"):
        Epilogue(combine="add")
    with pytest.raises(InvalidOption, match="combine='' with a second operand"):
        Epilogue(other=torch.ones(1))
    case = CASES[0]
    with pytest.raises(InvalidOption, match="activation='swish'"):
        linear_packed(*case.arguments[:-2], "swish", "")


def test_rows_are_copied_only_where_they_must_be() -> None:
    x = torch.zeros(4, 6)
    assert contiguous_rows(x[:, :4], 4).data_ptr() == x.data_ptr()
    assert contiguous_rows(x.t(), 4).stride() == (4, 1)


def test_new_tensors_are_made_on_the_device() -> None:
    """The graph was captured on a CPU, and says so at each tensor that it makes."""

    class Made(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0], device=x.device)[:, None] * self.table

    rows = {0: torch.export.Dim("rows", min=2, max=9)}
    graph = fxopt.capture(Made(), (torch.zeros(3, 4),), dynamic_shapes=(rows,))
    module = placed(graph, torch.device("meta"))
    (result,) = module(torch.empty(5, 4, device="meta"))
    assert result.device.type == "meta" and result.shape == (5, 4)
    assert graph.run([torch.zeros(2, 4)])[0].device.type == "cpu"
