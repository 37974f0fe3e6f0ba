"""Whole models of benchmarks/wasm.py, and pruning in blocks: what is timed is their shape, so weights are random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

# MobileNetV2 (Sandler et al., 2018), table 2: expansion, outputs, blocks, stride.
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def _unit(inner: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(inner, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else [])]


class _Inverted(nn.Module):
    def __init__(self, inner: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inner * expansion
        layers = _unit(inner, wide, 1) if expansion > 1 else []
        layers += [*_unit(wide, wide, 3, stride, wide), *_unit(wide, outputs, 1, act=False)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inner == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block, with its shortcut where shapes allow one."""
        y: Tensor = self.layers(x)
        return x + y if self.is_residual else y


class MobileNetV2(nn.Module):
    """[N, 3, 224, 224] -> [N, 1000]; batch norms have the statistics of random images."""

    def __init__(self) -> None:
        super().__init__()
        layers, inner = _unit(3, 32, 3, 2), 32
        for expansion, outputs, blocks, stride in _STAGES:
            for index in range(blocks):
                layers.append(_Inverted(inner, outputs, expansion, stride if index == 0 else 1))
                inner = outputs
        self.features = nn.Sequential(*layers, *_unit(inner, 1280, 1))
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        y: Tensor = self.head(self.features(x).mean((2, 3)))
        return y


def mobilenet() -> MobileNetV2:
    """MobileNetV2 of seed 0."""
    torch.manual_seed(0)
    model = MobileNetV2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 224, 224))
    return model.eval()


class Encoder(nn.Module):
    """Two pre-norm transformer layers of width 256 and 1024 in four heads: [N, T, 256] -> the same."""

    def __init__(self, width: int = 256, wide: int = 1024, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(width, wide, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's result."""
        for layer in self.layers:
            x = layer(x)
        return x


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, wide: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and a perceptron, both with shortcuts."""
        batch, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        y = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return y


def encoder() -> Encoder:
    """The encoder of seed 0."""
    torch.manual_seed(0)
    return Encoder().eval()


def digits_vit() -> nn.Module:
    """The example model with the trained weights of its ONNX file."""
    import onnx

    from examples.models import DigitsViT

    file = onnx.load(Path(__file__).parent.parent / "examples" / "models" / "digits-vit.onnx")
    stored = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in file.graph.initializer}
    model = DigitsViT()
    state = model.state_dict()
    # the weights of linears are transposed, under numbers in the order of the layers
    rest = sorted((name for name in stored if name not in state and stored[name].dim() == 2), key=lambda n: int(n[4:]))
    turned = iter(rest)
    model.load_state_dict({key: stored[key] if key in stored else stored[next(turned)].t() for key in state})
    return model.eval()


def products(model: nn.Module) -> Iterator[Tensor]:
    """The weights of linears and of 1 x 1 convolutions, but of the first and last ones."""
    found = [
        module.weight for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]  # fmt: skip
    yield from found


def prune(model: nn.Module, width: int, density: float) -> None:
    """Keep the strongest share of the blocks of `width` outputs x 1 input of every product, by their absolute sums."""
    with torch.no_grad():
        for weight in products(model):
            blocks = weight.view(-1, width, weight[0].numel())
            strength = blocks.abs().sum(1)
            limit = strength.flatten().kthvalue(max(1, int(strength.numel() * (1 - density)))).values
            blocks.mul_((strength > limit)[:, None])
