"""Whole models against torch in float64: on this machine, in wasmtime, in Node; refusals; artifacts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidInput, Unsupported
from fxopt.frontends.torch_export import load
from tests.backends.tvm import harness

from fxopt.backends.tvm import Tvm  # isort: skip

__all__ = ["harness"]
pytestmark = pytest.mark.slow
F = nn.functional


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Separable(nn.Module):
    """Like MobileNet: strided stem, depthwise and 1 x 1 convolutions, batch norm, global average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(8, 20, 1), nn.ReLU6())
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(20, 7)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = self.point(y + self.depth(y))
        return self.head(F.adaptive_avg_pool2d(self.pool(y), 1).flatten(1))


class Encoder(nn.Module):
    """Tokens, attention with a mask, layer norm, GELU, a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        keep = mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        weight = mask.unsqueeze(-1).to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return x, F.normalize(mean, dim=-1)


class Plain(nn.Module):
    """Attention written out: matmul, scale, softmax, slices, concatenation, where."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.softmax(x @ y.transpose(-1, -2) * 0.25, dim=-1) @ y
        first, second = x.chunk(2, dim=-1)
        joined = torch.cat([torch.lgamma(first.abs() + 1) * 0 + second, -first, torch.where(first > 0, first, second)], dim=1)
        return scores, joined.mean((0, 2)) + torch.arange(3 * x.shape[1]) * 0.5


class Everything(Plain):
    """The same without the logarithm of the gamma function, which has no kernel."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.softmax(x @ y.transpose(-1, -2) * 0.25, dim=-1) @ y
        first, second = x.chunk(2, dim=-1)
        joined = torch.cat([second, -first, torch.where(first > 0, first, second)], dim=1)
        return scores, joined.mean((0, 2)) + torch.arange(3 * x.shape[1]) * 0.5


class Waves(nn.Module):
    """One-dimensional convolutions: strided, dilated, depthwise; padding, average pooling, a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 5, stride=2, padding=3)
        self.second = nn.Conv1d(6, 6, 3, dilation=2, groups=6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm(self.second(F.pad(F.relu(self.first(x)), (1, 2)))))
        z = F.avg_pool2d(y[:, :, None, :], (1, 3), (1, 2), (0, 1))
        return torch.softmax(z, dim=1) + y.amax(-1, keepdim=True)[..., None]


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if name == "encoder":
        ids = torch.randint(0, 50, (2, 11), generator=generator)
        return ids, (torch.arange(11) < torch.tensor([[7], [11]])).long()
    shapes = {
        "perceptron": [(3, 13)],
        "separable": [(2, 3, 21, 19)],
        "everything": [(2, 5, 8), (2, 7, 8)],
        "waves": [(2, 4, 37)],
    }[name]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


MODELS = {
    "perceptron": Perceptron,
    "separable": Separable,
    "encoder": Encoder,
    "everything": Everything,
    "waves": Waves,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().eval()
    return model


def exact(model: nn.Module, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    wide = [x.double() if x.is_floating_point() else x for x in given]
    found = model.double()(*wide)
    return list(found) if isinstance(found, tuple) else [found]


def no_worse(found: list[Any], name: str) -> None:
    """No further from float64 than twice torch's float32, or than rounding."""
    given = inputs(name)
    with torch.no_grad():
        theirs = made(name)(*given)
        truth = exact(made(name), given)
    theirs = list(theirs) if isinstance(theirs, tuple) else [theirs]
    assert len(found) == len(truth)
    for ours, torchs, best in zip(found, theirs, truth, strict=True):
        assert tuple(ours.shape) == tuple(best.shape)
        limit = 2 * float((torchs - best).abs().max()) + 4e-7 * float(best.abs().max())
        assert float((ours - best).abs().max()) <= limit


@pytest.mark.parametrize("target", ["host", "wasm", "wasm-relaxed", "cortex-a53"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, target: str) -> None:
    graph = load(made(name), inputs(name))
    executable = Tvm().compile(graph, get_target(target))
    no_worse(executable.run(inputs(name)), name)
    assert ("not here" in executable.executed_on) == (target == "cortex-a53")
    assert ("wasmtime" in executable.executed_on) == target.startswith("wasm")
    executable.close()


def test_sparse_weights_run_sparse() -> None:
    model = made("perceptron")
    weight = model.net[2].weight
    keep = torch.rand(weight.shape[0] // 3 + 1, weight.shape[1], generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        weight.mul_(keep.repeat_interleave(16, 0)[: weight.shape[0]])
    executable: Any = Tvm().compile(load(model, inputs("perceptron")), get_target("host"))
    assert any("bsr" in step for step in executable.steps)
    truth = exact(model, inputs("perceptron"))[0]
    assert float((executable.run(inputs("perceptron"))[0] - truth).abs().max()) < 1e-6


def forms(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight [out, in] in every form that has a kernel, by the kernel's name."""
    groups = weight.view(-1, 32, weight.shape[1] // 4, 4)
    shared = groups * (groups.abs().sum(1).argsort(-1).argsort(-1) >= 2)[:, None]
    blocks = weight.view(-1, 32, weight.shape[1])
    kept = torch.rand(len(blocks), weight.shape[1], generator=torch.Generator().manual_seed(0)) < 0.2
    own = weight.view(len(weight), -1, 4)
    return {
        "dense": weight,
        "nm": shared.reshape(weight.shape),
        "bsr": (blocks * kept[:, None]).reshape(weight.shape),
        "panel_dense": (own * (own.abs().argsort(-1).argsort(-1) >= 2)).reshape(weight.shape),
    }


@pytest.mark.parametrize("target", ["host", "wasm"])
@pytest.mark.parametrize("kernel", ["dense", "nm", "bsr", "panel_dense"])
def test_the_form_of_a_linear_follows_its_weight(kernel: str, target: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 96), torch.randn(70, 64)
    model.weight.data = forms(model.weight.detach())[kernel]
    executable: Any = Tvm().compile(load(model.eval(), (x,)), get_target(target))
    assert [step.split("_", 2)[2].split(" ")[0] for step in executable.steps] == [kernel]
    truth = model.double()(x.double()).detach()
    assert float((executable.run([x])[0] - truth).abs().max()) < 1e-6


def test_neighbours_are_fused() -> None:
    executable: Any = Tvm().compile(load(made("perceptron"), inputs("perceptron")), get_target("host"))
    assert [step.split("_")[2].split(" ")[0] for step in executable.steps] == ["dense", "dense", "dense"]


def test_what_has_no_kernel_runs_in_torch_and_is_named() -> None:
    torch.manual_seed(0)
    graph = load(Plain(), inputs("everything"))
    executable = Tvm().compile(graph, get_target("host"))
    assert "aten.lgamma.default has no kernel" in executable.executed_on
    no_worse(executable.run(inputs("everything")), "everything")
    with pytest.raises(Unsupported, match="1 operator has no kernel for wasm-simd: lgamma: aten.lgamma"):
        Tvm().compile(graph, get_target("wasm"))
    with pytest.raises(Unsupported, match="cannot be saved"):
        executable.save("nowhere")


def test_other_sizes_are_compiled_when_they_come() -> None:
    graph = load(made("perceptron"), inputs("perceptron"), {"x": {0: "batch"}})
    executable = Tvm().compile(graph, get_target("host"))
    x = torch.randn(9, 13)
    truth = exact(made("perceptron"), (x,))[0]
    assert float((executable.run([x])[0] - truth).abs().max()) < 1e-6


def test_inputs_are_checked() -> None:
    executable = Tvm().compile(load(made("perceptron"), inputs("perceptron")), get_target("host"))
    with pytest.raises(InvalidInput, match=r"input 'x' has shape \[3, 12\], expected \[3, 13\]"):
        executable.run([torch.zeros(3, 12)])
    with pytest.raises(InvalidInput, match="input 'x' is float64, expected float32"):
        executable.run([torch.zeros(3, 13).double()])
    with pytest.raises(InvalidInput, match="2 inputs given, the model takes 1"):
        executable.run([torch.zeros(3, 13)] * 2)


def test_types_without_kernels_are_refused() -> None:
    graph = load(made("perceptron").half(), (inputs("perceptron")[0].half(),))
    with pytest.raises(Unsupported, match="torch.float16"):
        Tvm().compile(graph, get_target("wasm"))
