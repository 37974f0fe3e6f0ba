"""Operators of many kinds against torch in float64, on this machine and in wasmtime: one model of each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported
from fxopt.frontends.torch_export import load
from tests.backends.tvm import harness

from fxopt.backends.tvm import Tvm  # isort: skip

__all__ = ["harness"]
pytestmark = pytest.mark.slow
F = nn.functional
Function = Callable[..., Any]


class Many(nn.Module):
    """Every function of the inputs."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self.functions = functions
        self.held = nn.ModuleList(item for item in functions if isinstance(item, nn.Module))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for function in self.functions:
            result = function(*inputs)
            found += result if isinstance(result, (tuple, list)) else [result]
        return tuple(found)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


SEQUENCE, IMAGE, TOKENS = randn(2, 6, 17), randn(2, 4, 9, 7), torch.arange(12).view(2, 6) * 5 % 13 - 3

POINTWISE: list[Function] = [
    lambda x: torch.sin(20 * x), lambda x: torch.cos(20 * x), lambda x: torch.log(x.abs()), lambda x: torch.log1p(x.abs() / 99),
    lambda x: torch.expm1(x / 99), lambda x: torch.expm1(3 * x), lambda x: torch.log2(x.abs() + 1), torch.sign, torch.ceil,
    lambda x: torch.round(4 * x) / 4, lambda x: torch.trunc(3 * x), lambda x: torch.floor(3 * x), F.softplus, F.elu,
    F.leaky_relu, F.mish, F.selu, F.celu, F.logsigmoid, F.tanhshrink, F.hardshrink, lambda x: x.abs() ** 1.7,
    lambda x: x**4, lambda x: x**-3, lambda x: 2**x, lambda x: (x.abs() + 1) ** 0.5, lambda x: x % 0.75,
    lambda x: torch.div(x, 0.3, rounding_mode="floor"), lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    lambda x: torch.where(torch.log(x).isnan() | (1 / (0 * x)).isinf(), -x, x), lambda x: (x > 0) == (x < 1),
    lambda x: (x > 0) * (x < 1), lambda x: (x > 0) + (x < -1), lambda x: torch.exp2(x),
]  # fmt: skip
INTEGERS: list[Function] = [
    lambda t: t // 3, lambda t: t % 4, lambda t: torch.div(t, 3, rounding_mode="trunc"), lambda t: t.cumsum(1),
    lambda t: t.sum(1), lambda t: t.amax(0), lambda t: (t > 3).any(1), lambda t: (t > -4).all(1), lambda t: t.argmax(1),
    lambda t: t.sort(1), lambda t: t.topk(3, 1, largest=False), lambda t: F.one_hot(t + 3, 13),
    lambda t: (t > 0).sum(1), lambda t: t.flip(1), lambda t: torch.gather(t, 1, t % 6), lambda t: t.int() * 2,
]  # fmt: skip
LOOKUPS: list[Function] = [
    lambda x: x.flip(1, 2), lambda x: x.roll(2, 1), lambda x: x.repeat(1, 2, 3), lambda x: x.repeat_interleave(2, 1),
    lambda x: x.index_select(1, torch.tensor([5, 0, 0])), lambda x: x[:, [1, 1, 4]], lambda x: x[:, [0, 5], [3, 16]],
    lambda x: torch.gather(x, 1, torch.tensor([[[0], [5]], [[3], [3]]]).expand(-1, -1, 17)), lambda x: x.cumsum(1),
    lambda x: x.max(-1), lambda x: x.min(1), lambda x: x.argmin(1), lambda x: x.sort(-1), lambda x: x.topk(4),
    lambda x: x.prod(-1), lambda x: x.var(-1), lambda x: x.std((0, 1)), lambda x: torch.log_softmax(x, 1),
    lambda x: x.norm(p=1, dim=-1), lambda x: torch.einsum("bij,bkj->bik", x, x), lambda x: x.triu(1),
    lambda x: x.scatter(1, torch.tensor([[[2]], [[4]]]).expand(-1, -1, 17), 7.0),
    lambda x: x.scatter(2, torch.tensor([[[2, 1]], [[4, 0]]]).expand(-1, 6, -1), x[:, :, :2] * 3),
]  # fmt: skip


def spatial() -> list[Function]:
    torch.manual_seed(0)
    return [
        nn.Upsample(scale_factor=2), nn.Upsample(size=(13, 11)), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(size=(13, 11), mode="bilinear", align_corners=True), nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.ConvTranspose2d(4, 6, (2, 3), (2, 1), groups=2, bias=False),
        nn.ConvTranspose2d(4, 4, 3, dilation=2), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4),
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 3, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((4, 3)),
        nn.PixelShuffle(2), nn.ReflectionPad2d((1, 2, 0, 1)), nn.ReplicationPad2d(1), nn.Unfold(2), lambda x: F.glu(x, 1),
        lambda x: F.max_pool1d(x[0], 2), lambda x: F.avg_pool1d(x[0], 2), lambda x: F.conv_transpose1d(x[0], torch.ones(9, 2, 3).to(x.dtype), stride=2),
    ]  # fmt: skip


def first(module: nn.Module) -> Function:
    """The first result of a recurrent layer."""

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return self.module(x)[0]

    return Only()


def recurrent() -> list[Function]:
    torch.manual_seed(0)
    return [
        first(nn.LSTM(17, 5, batch_first=True, bidirectional=True)),
        first(nn.GRU(17, 5, num_layers=2, batch_first=True)),
    ]


CASES: dict[str, tuple[Callable[[], list[Function]], Tensor]] = {
    "pointwise": (lambda: POINTWISE, SEQUENCE),
    "integers": (lambda: INTEGERS, TOKENS),
    "lookups": (lambda: LOOKUPS, SEQUENCE),
    "spatial": (spatial, IMAGE),
    "recurrent": (recurrent, SEQUENCE),
}


@pytest.mark.parametrize("target", ["host", "wasm-simd"])
@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, target: str) -> None:
    harness.machine(target)
    torch.manual_seed(0)
    functions, x = CASES[name]
    model = Many(functions()).eval()
    executable = Tvm().compile(load(model, (x,)), get_target(target))
    assert "torch" not in executable.executed_on
    found = executable.run((x,))
    with torch.no_grad():
        theirs = model(x)
        exact = model.double()(x.double() if x.is_floating_point() else x)
    for number, (ours, torchs, best) in enumerate(zip(found, theirs, exact, strict=True)):
        assert ours.shape == torchs.shape and ours.dtype == torchs.dtype, number
        if not torchs.dtype.is_floating_point:
            assert torch.equal(ours, torchs), number
            continue
        limit = 2 * float((torchs - best).abs().max()) + 4e-7 * float(best.abs().max())
        assert float((ours - best).abs().max()) <= limit, number
    executable.close()


def test_edges_of_functions() -> None:
    """Infinity, NaN, zero, the smallest and largest numbers, as torch has them."""
    harness.machine("host")
    x = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1e-38, 3e38, 1e-7, -1e-7, 0.5, 2.5]
    )
    functions: list[Function] = [torch.log, torch.log1p, torch.expm1, torch.sign, torch.ceil, torch.trunc, torch.round]
    model = Many(functions)
    found = Tvm().compile(load(model, (x,)), get_target("host")).run((x,))
    for ours, theirs in zip(found, model(x), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.allclose(ours, theirs, rtol=3e-7, atol=0, equal_nan=True), (ours, theirs)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.view(torch.int32), "takes bits for those of another type"),
        (lambda x: x**x, "neither a base nor an exponent that is one known number"),
        (lambda x: F.conv3d(x[None, None], torch.ones(1, 1, 1, 1, 1)), "convolves 3 axes; the kernels take 1 or 2"),
        (lambda x: x.repeat(1, 60, 60).flatten().sort()[0], "orders 734400 of 734400 values"),
        (lambda x: x.nonzero(), "nonzero.default has no kernel"),
    ],
)
def test_refusals(function: Function, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Tvm().compile(load(Many([function]), (SEQUENCE,)), get_target("wasm-simd"))
